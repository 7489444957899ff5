"""Phase 1: a preference dataset goes in, a sealed reference store comes out."""
