"""What `--dataset` names -> preference rows, checked as a whole: text still, before any tokenizer has seen it.

files.py finds the files, reading.py reads them, columns.py says what their columns mean, dataset.py gives the rows and checks them,
source_columns.py has what the store keeps beside the numbers. The rest of the project imports all but files.py and reading.py.
"""
