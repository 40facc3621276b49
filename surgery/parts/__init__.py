"""The small trainable modules, one family a file. Each word here makes a part for a rule."""

import einops
import torch

from .adapter_sum import coefficients, combined, fusion, scaled
from .adapters import Adapter, QuickGELU, adapter
from .arc_adapters import arc, projection
from .banks import bank, bases, pool, randlora, unilora, vblora
from .binary import binary_adapter, binary_lora
from .conv import convpass
from .deltas import hira, loha, lokr, miss, olora, pissa, rlrr
from .domain_adapters import domains
from .dynamic_adapters import DynamicAdapter, MixtureOfDynamicAdapters, dynamic_adapter, dynamic_moa
from .elastic import elastic_adapter, elastic_lora, elastic_prompt
from .fact import fact_tk, fact_tt, tk_factors, tt_factors
from .gated import gated_prompt
from .geometry import centre_distances, geometry_adapter, local_attention
from .graph_spectrum import spectral_adapter, spectral_basis
from .instance_prompts import InstancePrompt, instance_prompt
from .interventions import loreft
from .kronecker import compacter, kadaptation, krona, phm_rule, slow_factors
from .low_and_high_rank import vida
from .low_rank import dylora, lora, prolora
from .low_rank_forms import adalora, gralora, mlae, snell
from .made_of_weights import deft, delora, glora, kasa, mica, peanut, tiny_vector, tinylora
from .mixture import MixtureOfAdapters, moa
from .mosa import sparse_experts
from .prefixes import prefix, prefix_features
from .prompts import Prompt, PromptGenerator, prompt, prompt_generator
from .rep_adapter import repadapter
from .reversible_streams import reversible, small_adapter
from .rotations import boft, goft, hra, oft, psoft, road
from .routed_low_rank import lily, lily_ups, molora, toplora
from .row_lengths import magnitude, rescale, shift
from .scale import scale_shift
from .shared_low_rank import frozen, tied, tied_lora, vera
from .side_networks import back, bypass, climb, heard, ladder, mixer, track
from .skills import skill_lora
from .sparse_updates import rows, sparse
from .spectral import c3a, fourierft, places, waveft
from .visual_adapters import adapter_plus, mona, salient

__all__ = [
    "Adapter", "DynamicAdapter", "InstancePrompt", "MixtureOfAdapters",
    "MixtureOfDynamicAdapters", "Prompt", "PromptGenerator", "QuickGELU", "adalora", "adapter",
    "adapter_plus", "arc", "back", "bank", "bases", "binary_adapter", "binary_lora", "boft",
    "bypass", "c3a", "centre_distances", "climb", "coefficients", "combined", "compacter",
    "convpass", "deft", "delora", "domains", "dylora", "dynamic_adapter", "dynamic_moa",
    "elastic_adapter", "elastic_lora", "elastic_prompt", "fact_tk", "fact_tt", "fourierft",
    "frozen", "fusion", "gated_prompt", "geometry_adapter", "glora", "goft", "gralora", "heard",
    "hira", "hra", "instance_prompt", "kadaptation", "kasa", "krona", "ladder", "lily",
    "lily_ups", "local_attention", "loha", "lokr", "lora", "loreft", "magnitude", "mica",
    "miss", "mixer", "mlae", "moa", "molora", "mona", "oft", "olora", "peanut", "phm_rule",
    "pissa", "places", "pool", "prefix", "prefix_features", "projection", "prolora", "prompt",
    "prompt_generator", "psoft", "randlora", "repadapter", "rescale", "reversible", "rlrr",
    "road", "rows", "salient", "scale_shift", "scaled", "shift", "skill_lora", "slow_factors",
    "small_adapter", "snell", "sparse", "sparse_experts", "spectral_adapter", "spectral_basis",
    "tied", "tied_lora", "tiny_vector", "tinylora", "tk_factors", "toplora", "track",
    "tt_factors", "unilora", "vblora", "vera", "vida", "waveft",
]  # fmt: skip

# einops keeps the types that it has met: if compiled code were the first to use it, its first call
# would add some, and it would be compiled again at the second
for _met in (torch.empty(0), torch.nn.Parameter(torch.empty(0))):
    einops.rearrange(_met, "n -> n")

# what rules, and files of them, may call
WORDS = [name for name in __all__ if name == "QuickGELU" or not isinstance(globals()[name], type)]
