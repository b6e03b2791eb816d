"""The plaintext side: partial ReLUs, their count, the architectures, bring-your-own-model."""

from .budget import allocate as allocate
from .linearize import feeding_layers as feeding_layers
from .linearize import linearize as linearize
from .linearize import with_activations as with_activations
from .relu import MaskedReLU as MaskedReLU
from .relu import ReLUCount as ReLUCount
from .relu import count_relus as count_relus
from .relu import relu_sites as relu_sites
from .zoo import build as build
