"""Phase 2: DPO under DeepSpeed ZeRO-2 from a sealed reference store, without a reference model."""
