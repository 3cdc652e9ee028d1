"""What an attempt needs, imported once, in the process that attempts are forked from."""

import bitsandbytes
import torch
import transformers.models.llama.modeling_llama
from transformers.utils.logging import disable_progress_bar

import qlora.run

torch.set_num_threads(1)
disable_progress_bar()
__all__ = ["bitsandbytes", "qlora", "torch", "transformers"]
