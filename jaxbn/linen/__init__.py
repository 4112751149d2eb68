"""Flax Linen layers: they hold parameters and state, and call the functions."""

from jaxbn.linen._batch_norm import BatchNorm
from jaxbn.linen._input_norm import InputNormRNN
from jaxbn.linen._recurrent import GRUCell, LSTMCell
from jaxbn.linen._renorm import BatchRenorm

__all__ = ["BatchNorm", "BatchRenorm", "GRUCell", "InputNormRNN", "LSTMCell"]
