"""The table of `docs/models.md`: what the compiler says of the architectures of the zoo."""

from __future__ import annotations

from references import step_of
from zoo import by_name

from etcompile.paths import short_list

__all__ = ["models_table"]

#: Architectures by their names, and the models of the zoo that have them.
ARCHITECTURES = {
    "Leaky integrator with a time constant for each unit": "learned_decay",
    "IndRNN": "indrnn",
    "LRU, complex diagonal recurrence": "lru",
    "minGRU": "min_gru",
    "minLSTM": "min_lstm",
    "RG-LRU, gates shared by units": "rg_lru",
    "S4-like selective step, several states for each channel": "selective_state_space",
    "Mamba (S6): step, B and C from the input": "mamba",
    "Linear attention with its normaliser": "linear_attention",
    "RetNet with rotated keys": "retnet",
    "Gated linear attention": "gated_linear_attention",
    "Gated linear attention from one fused projection": "one_projection",
    "mLSTM without running maximum": "mlstm",
    "mLSTM": "mlstm_with_running_maximum",
    "LIF without recurrent weights": "lif_feedforward",
    "Sparse input to rate units": "sparse_segment_sum",
    "Potential and adaptation in one array": "states_in_one_array",
    "Delays as a shift register": "shift_register",
    "Norm between state and readout": "layer_norm_after_the_state",
    "DeltaNet": "delta_net",
    "Linear attention in two layers": "two_layers_of_linear_attention",
    "Norm before the state": "layer_norm_feedforward",
    "Softmax before the state": "softmax_between",
    "Vanilla recurrent network": "vanilla",
    "GRU": "gru",
    "MGU": "mgu",
    "LSTM": "lstm",
    "GRU in two layers": "gru_gru",
    "LIF with recurrent weights": "lif_delta",
    "ALIF with recurrent weights": "alif_exponential",
    "GIF with recurrent weights": "gif",
    "Spiking layers before a leaky readout": "two_spiking_layers_and_a_leaky_readout",
    "Convolutional recurrent network": "conv2d_recurrent",
    "Sparse recurrent network": "sparse_segment_sum_recurrent",
}


def models_table() -> str:
    """One line for each architecture: whether it is exact, for how many positions a trace stands, and where credit ends."""
    lines = ["| architecture | exact | positions | credit ends at |", "| --- | --- | --- | --- |"]
    for title, name in ARCHITECTURES.items():
        report = step_of(by_name(name)).report()
        positions = max(p.positions for p in report.parameters)
        ends = dict.fromkeys(f"`{c.primitive}` of {short_list(c.origins)}" for c in report.cuts)
        lines.append(
            f"| {title} (`{name}`) | {'yes' if report.exact else 'no'} | {'many' if positions > 1 else 'one'} | {'; '.join(ends)} |"
        )
    return "\n".join(lines)
