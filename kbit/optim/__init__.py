"""Optimizers whose states are k-bit codes, for any PyTorch training.

optimizer = kbit.optim.AdamW(model.parameters(), lr=1e-3, state="adam8bit")
kbit.optim.quantize_states(torch.optim.Muon(matrices), momentum=kbit.optim.STATES["4bit"].momentum)
"""

from kbit.optim.optimizers import SGD as SGD
from kbit.optim.optimizers import Adam as Adam
from kbit.optim.optimizers import AdamW as AdamW
from kbit.optim.optimizers import Lion as Lion
from kbit.optim.post_step import quantize_states as quantize_states
from kbit.optim.stable_embedding import StableEmbedding as StableEmbedding
from kbit.optim.stable_embedding import embedding_stable as embedding_stable
from kbit.optim.stable_embedding import make_embedding_stable as make_embedding_stable
from kbit.optim.states import STATES as STATES
from kbit.optim.states import States as States
