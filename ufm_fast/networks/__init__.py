"""Small networks beside the model: data that ship in packages, training with the fused losses,
collapse layer by layer.
"""

from ufm_fast.networks.data import DATA, DataSet, Examples, load
from ufm_fast.networks.layers import LayerCollapse, alignment, layer_collapse, probe_solution
from ufm_fast.networks.models import MODELS, Architecture, Network
from ufm_fast.networks.probe import probe
from ufm_fast.networks.train import LOSSES, Options, Training, train

__all__ = [
    "DATA",
    "LOSSES",
    "MODELS",
    "Architecture",
    "DataSet",
    "Examples",
    "LayerCollapse",
    "Network",
    "Options",
    "Training",
    "alignment",
    "layer_collapse",
    "load",
    "probe",
    "probe_solution",
    "train",
]
