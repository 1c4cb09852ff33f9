"""From a Shape and a Grid to this rank's model chunks: megatron-core's GPTModel through a layer spec of our parts."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor, nn
from torch.func import functional_call

from megamod.batch import Batch
from megamod.config import ModelConfig
from megamod.model import backends
from megamod.model.attention import PackedRow, self_attention_spec
from megamod.model.head import Head, ScoreHead, Scores
from megamod.model.layer import DecoderLayer, SwiGLU
from megamod.model.lora import LINEARS, Saved
from megamod.model.nf4 import Linears
from megamod.model.norm import RMSNorm
from megamod.model.shape import Shape
from megamod.parallel.collectives import sum_marked
from megamod.parallel.grid import Grid
from megamod.weights.table import padded_vocab

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


class Decoder(GPTModel):
    """One chunk of the model: `chunk(batch)` gives hidden states, and the last chunk's `head` turns them into a Head."""

    def __init__(self, shape: Shape, grid: Grid, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.shape, self.grid = shape, grid
        self.saved = Saved()  # what adapters have of the embedding and the head
        if self.post_process and shape.score is not None:
            self.output_layer = Scores(self.config, shape.score)

    def forward(self, batch: Batch) -> Tensor:
        """`[T', 1, C]`: the stage's output, T' = T/cp, or T/(cp·tp) with sequence parallelism."""
        if self.training:
            # What is drawn in the forward pass comes from the micro-batch's seed. It goes by torch's generator, the one place whose
            # state recomputation restores, so that it draws the same again.
            torch.default_generator.manual_seed(batch.seed)
        row = PackedRow.of(batch, self.shape, self.config.params_dtype, self.grid)
        tokens = batch.tokens[None]  # positions are in `row`: position_embedding_type is "none"
        embedded = self._embedded(tokens) if self.pre_process else None
        return super().forward(
            input_ids=tokens, position_ids=tokens, attention_mask=None, decoder_input=embedded, packed_seq_params=row
        )  # fmt: skip

    def _embedded(self, tokens: Tensor) -> Tensor:
        """`[T', 1, C]` of `[1, T/cp]` tokens; always part of the graph.

        Recomputation takes an input that requires no gradient for a layer that needs none, and a pipeline's first stage must have
        something to go back to: with a frozen embedding, every adapter of that stage would silently stay as it is.
        """
        weight = {"word_embeddings.weight": self._own("embedding.word_embeddings.weight")}
        result: Tensor = functional_call(self.embedding, weight, kwargs={"input_ids": tokens, "position_ids": tokens})
        return result.requires_grad_() if torch.is_grad_enabled() and not result.requires_grad else result

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Stop at the hidden states: the loss asks its Head for what it needs of the vocabulary."""
        return hidden_states

    def head(self, hidden: Tensor, batch: Batch) -> Head:
        """The head over this chunk's output; on the last chunk only."""
        place = (batch.rows, self.grid.tp.group, self.grid.sp)
        is_embedding = self.share_embeddings_and_output_weights and self.pre_process  # a tied last stage has a copy
        weight = self._own("embedding.word_embeddings.weight" if is_embedding else "output_layer.weight")
        if (score := self.shape.score) is None:
            return Head(hidden, weight, self.shape.vocab, *place)
        return ScoreHead(hidden, weight, self._own("output_layer.bias") if score.every_token else None, score, *place)

    def _own(self, name: str) -> Tensor:
        """The parameter `name`, or what the active adapter has in its place."""
        return self.saved.instead_of(name, self.get_parameter(name))


def transformer_config(cfg: ModelConfig, shape: Shape, grid: Grid, deterministic: bool) -> TransformerConfig:
    """megatron-core's configuration of `shape` on `grid`: every value that differs from its defaults, and why."""
    dtype = DTYPES[cfg.dtype]
    recompute: dict[str, Any] = {}
    if cfg.recompute == "full":  # every layer's input is kept, the rest computed again
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif cfg.recompute == "selective":
        recompute = {"recompute_granularity": "selective", "recompute_modules": list(cfg.recompute_modules or ("core_attn",))}
    stages: list[list[str]] = [["decoder"] * n for n in grid.layers_per_stage]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on options that are set on purpose
        return TransformerConfig(
            num_layers=shape.layers,
            hidden_size=shape.hidden,
            num_attention_heads=shape.heads,
            num_query_groups=shape.kv_heads,
            kv_channels=shape.head_dim,
            ffn_hidden_size=shape.ffn,
            normalization="RMSNorm",
            layernorm_epsilon=shape.norm_eps,
            qk_layernorm=shape.qk_norm,  # finalize_model_grads then sums q_ and k_layernorm gradients over tp
            gated_linear_unit=True,
            activation_func=F.silu,
            use_te_activation_func=True,  # TransformerEngine's slot, where it is a module that makes gate and up one; ours is in it
            add_bias_linear=False,
            add_qkv_bias=shape.qkv_bias,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            bf16=dtype is torch.bfloat16,
            tensor_model_parallel_size=grid.tp.size,
            pipeline_model_parallel_size=grid.pp.size,
            virtual_pipeline_model_parallel_size=grid.vpp if grid.vpp > 1 else None,
            pipeline_model_parallel_layout=stages if grid.pp.size > 1 else None,
            context_parallel_size=grid.cp.size,
            sequence_parallel=grid.sp,
            tp_comm_overlap=grid.tp_comm_overlap,  # read by TransformerEngine's linears alone
            # Interleaved stages send both ways at once. Batched, that deadlocks or, on gloo with two stages, mixes up messages
            # without an error; overlapped, each message has its own request. On meta tensors nothing can be batched.
            overlap_p2p_comm=grid.vpp > 1,
            batch_p2p_comm=grid.vpp == 1 and grid.device.type != "meta",
            # Free what was sent: CUDA's streams keep the bytes until they have left, gloo's threads do not.
            deallocate_pipeline_outputs=grid.device.type == "cuda",
            calculate_per_token_loss=True,  # no scaling by micro-batches or ranks: batch.mean has divided already
            finalize_model_grads_func=_finalize,
            perform_initialization=False,  # weights are read, or drawn by weights.load.randomize
            use_cpu_initialization=grid.device.type != "cuda",
            gradient_accumulation_fusion=False,  # needs NVIDIA's apex
            masked_softmax_fusion=False,
            bias_dropout_fusion=False,
            persist_layer_norm=False,
            deterministic_mode=deterministic,
            **recompute,
        )


def build(cfg: ModelConfig, shape: Shape, grid: Grid, *, deterministic: bool = False) -> tuple[list[Decoder], dict[str, str]]:
    """This rank's chunks of the model, one per virtual stage, uninitialised; and who computes what, for the log.

    Raises:
        MegamodError: a backend that cannot run here, or cannot do what the grid asks.
    """
    config = transformer_config(cfg, shape, grid, deterministic)
    attention_name, attend = backends.attention(cfg.attention, grid.device, DTYPES[cfg.dtype], deterministic)
    column, row = backends.linears(cfg.linear, grid.device)
    fusion = backends.fusion(cfg.fusion, grid.device)
    kernel = {"kernel": fusion == "triton"}
    norm, activation = ModuleSpec(RMSNorm, params=kernel), ModuleSpec(SwiGLU, params=kernel)
    linears = Linears(shape, grid, DTYPES[cfg.dtype])

    def layer(number: int) -> ModuleSpec:
        qkv, proj, fc1, fc2 = (linears.linear(number, place, kind) for place, kind in zip(LINEARS, (column, row, column, row), strict=True))
        return ModuleSpec(
            module=DecoderLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=norm,
                self_attention=self_attention_spec(qkv, proj, norm, shape, grid, attend),
                pre_mlp_layernorm=norm,
                mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(fc1, activation, fc2)),
            ),
        )

    chunks = []
    for stage in range(grid.vpp):
        number = stage * grid.pp.size + grid.pp.rank  # in pipeline order
        first = sum(grid.layers_per_stage[:number])
        layers = [layer(first + i) for i in range(grid.layers_per_stage[number])]
        with torch.device(grid.device if grid.device.type == "meta" else "cpu"):
            chunks.append(
                Decoder(
                    shape,
                    grid,
                    config=config,
                    transformer_layer_spec=TransformerBlockSubmodules(layers, norm),
                    vocab_size=padded_vocab(shape.vocab, grid.tp.size),
                    max_sequence_length=shape.max_position,
                    pre_process=number == 0,
                    post_process=number == len(grid.layers_per_stage) - 1,
                    parallel_output=True,
                    share_embeddings_and_output_weights=shape.tied,
                    position_embedding_type="none",
                    pg_collection=grid.groups,
                    vp_stage=stage if grid.vpp > 1 else None,
                )
            )
    linear = cfg.linear if shape.quantization is None else str(shape.quantization)
    return chunks, {"attention": attention_name, "linear": linear, "fusion": fusion}


def data_parallel(chunks: Sequence[Decoder], grid: Grid, *, overlap: bool = False) -> list[DistributedDataParallel]:
    """Wrap the chunks so that gradients accumulate in flat buffers, in at least fp32, and are reduced over dp × cp.

    Call it after the weights are loaded. The distributed optimizer's layout is used on every grid: with one data-parallel rank
    the share is the whole.

    Args:
        overlap: reduce bucket by bucket while the backward pass goes on.
    """
    config = chunks[0].config
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.params_dtype is torch.bfloat16,
        use_distributed_optimizer=True,
        overlap_grad_reduce=overlap,
        average_in_collective=False,
    )
    wrapped = [
        DistributedDataParallel(config, ddp, chunk, disable_bucketing=number > 0, pg_collection=grid.groups)
        for number, chunk in enumerate(chunks)
    ]
    if overlap:
        syncs = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = syncs if len(syncs) > 1 else syncs[0]
    return wrapped


def _finalize(
    model: list[nn.Module], num_tokens: Tensor | None, pg_collection: ProcessGroupCollection | None = None, force_all_reduce: bool = False
) -> None:
    """Sum gradients over dp × cp, over tp where ranks saw other tokens, over the stages that share the embedding; no scaling.

    And those of adapters' factors that several ranks hold: model.lora.
    """
    finalize_model_grads(model, None, pg_collection=pg_collection, force_all_reduce=force_all_reduce)
    sum_marked(param for chunk in model for param in chunk.parameters())
