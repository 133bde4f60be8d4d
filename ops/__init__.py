"""torch.library ops over packed sequences: reference, CPU and (where present) Triton implementations of each."""
