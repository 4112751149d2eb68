"""Flax NNX layers: they hold parameters and state, and call the functions."""

from jaxbn.nnx._batch_norm import BatchNorm
from jaxbn.nnx._input_norm import InputNormRNN
from jaxbn.nnx._recurrent import GRUCell, LSTMCell
from jaxbn.nnx._renorm import BatchRenorm

__all__ = ["BatchNorm", "BatchRenorm", "GRUCell", "InputNormRNN", "LSTMCell"]
