"""The date that a chat template asks for: one day for a whole store, or the rows of one store would say different things.

Templates of the Llama 3 kind call `strftime_now`, which transformers answers from the machine's clock.
"""

from datetime import date, datetime, time

from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from store.errors import InputError

ASKS = "strftime_now"


class DateWanted(InputError):
    """The template asks for the date, and no day was chosen."""


class Clock:
    """Answers a tokenizer's chat template with one day, and knows whether it was asked."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, day: str | None):
        """`day`: YYYY-MM-DD; None: the first question is an InputError."""
        self.asked = self.may_be_asked = False
        self.now = None if day is None else datetime.combine(date.fromisoformat(day), time())
        templates = tokenizer.chat_template
        for template in templates.values() if isinstance(templates, dict) else [templates]:
            if template is not None and ASKS in template:
                self.may_be_asked = True
                # transformers compiles a text once; what the template is given for an argument cannot be a function
                chat_template_utils._compile_jinja_template(template).globals[ASKS] = self._answer

    def _answer(self, pattern: str) -> str:
        self.asked = True
        if self.now is None:
            raise DateWanted(
                "the chat template writes today's date into every row, so the numbers would depend on the day",
                next=f"Choose the day, for this and every later run: --template-date {date.today().isoformat()}",
            )
        return self.now.strftime(pattern)
