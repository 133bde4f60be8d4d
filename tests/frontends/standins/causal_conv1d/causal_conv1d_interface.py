"""The signature of a package that needs a GPU."""


def causal_conv1d_fn(
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
    raise NotImplementedError("needs a GPU")
