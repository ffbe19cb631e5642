"""Operations on logits that never need to be seen at full resolution, each beside its plain reference."""
