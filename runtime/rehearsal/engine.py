"""Engine of one rank, with a fake model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel, WanVACETransformer3DModel

from runtime.engine import Engine
from runtime.errors import BadRequestError
from runtime.models.base import Condition, Embeddings, Expert, ExpertSettings
from runtime.models.family import Model
from runtime.models.loading import open_offload
from runtime.models.precision import Precision
from runtime.models.quantization import SCALES
from runtime.models.reading import readers, weight_bytes
from runtime.models.wan.adapter import Transformer, every_block, open_adapter
from runtime.models.wan.attention import SelfAttention
from runtime.models.wan.experts import read_transformer
from runtime.models.wan.folder import ModelKind, knows_frames
from runtime.models.wan.image import open_image_encoder
from runtime.models.wan.loading import change_of_blocks
from runtime.models.wan.parts import Parts, bytes_of_whole, choose_parts
from runtime.models.wan.text import PromptEncoder
from runtime.models.wan.vae import WanDecoder
from runtime.parallel.kernels import AUTO, GOOD_CUDNN, Card, choose, resolve
from runtime.parallel.sharding import Weights, WholeWeights
from runtime.parallel.topology import Degrees
from runtime.rehearsal.fake import DEVICE, FakeDevice, diffusers_module
from runtime.rehearsal.machine import Gpu
from runtime.rehearsal.offloads import FakeOffload
from runtime.rehearsal.peers import FakePeers, FakeRanks
from runtime.rehearsal.repeats import RepeatedBlocks, RepeatedChunks
from runtime.rehearsal.settings import RehearsedProfile
from runtime.rehearsal.shards import FakeShards
from runtime.request.config import Config
from runtime.request.memory import Memory
from runtime.request.video_request import VideoRequest
from runtime.sampling.plan import Plan
from runtime.sampling.prepare import build_networks
from runtime.sampling.run import Run

_HOPPER = (9, 0)


class RehearsedEngine(Engine):
    """An `Engine` on fake tensors, for one rank of a group whose other ranks do not exist.

    Args:
        config: config of the model.
        profile: settings of the model.
        ranks: this rank, and the group.
        degrees: requested topology.
        gpu: GPU that the job would run on.
        whole: whether to run all blocks and tiles, also those that equal others; the counts are the same.

    Attributes:
        whole: whether everything is run.
        fake: device that counts.
        parameters: number of the transformers' parameters.
    """

    ranks: FakeRanks
    profile: RehearsedProfile

    def __init__(
        self,
        config: Config,
        profile: RehearsedProfile,
        ranks: FakeRanks,
        degrees: Degrees,
        gpu: Gpu,
        *,
        whole: bool = False,
    ):
        self._known, self._gpu, self.whole, self.fake = profile, gpu, whole, FakeDevice()
        super().__init__(config, ranks, degrees)

    def prepare_fake(self, plan: Plan) -> Run:
        """Prepare a plan as `prepare` does, with fake embeddings; call it within `fake.running`."""
        noise_BCFHW = torch.empty(self.sizes.shape(plan.request), device=DEVICE)
        window_BCFHW = noise_BCFHW[:, :, plan.windows.slice(0)]
        text, image = self._embeddings(plan.request), self._condition(plan, window_BCFHW)
        group = self.ranks.group(plan.topology)
        networks = build_networks(plan, self.loaded.experts, group, self.heads, window_BCFHW, text, image)
        storage = torch.device("cpu") if self.config.memory.history == "offload" else None
        recipe = self.profile.recipe(plan.request, plan.preset, None)
        return Run(plan, recipe, networks, noise_BCFHW, image, storage=storage)

    @property
    def heads(self) -> int:
        """Number of a transformer's heads."""
        return self.sizes.architecture.heads

    @property
    def kind(self) -> ModelKind:
        """Kind of the model."""
        return ModelKind(self.model.pipeline)

    @property
    def adapter_dtype(self) -> torch.dtype:
        """Compute dtype of the transformers."""
        return self.loaded.dtype

    @contextmanager
    def vae_at_work(self) -> Iterator[AutoencoderKLWan | None]:
        """Hold the VAE on the device within the context; yields None on a rank that has none."""
        yield self._make_vae() if self._vae is None else self._vae

    def parts(self, vae: AutoencoderKLWan | None, latents_BCFHW: torch.Tensor) -> Parts:
        """Parts of frames that would be decoded beside what is held now."""

        def fits() -> bool:
            held = self.fake.ledger.now
            return vae is None or self._gpu.room(held + bytes_of_whole(vae, latents_BCFHW)) >= 0

        return choose_parts(self.config, self.ranks.size, fits)

    def _read_profile(self) -> RehearsedProfile:
        return self._known

    def _load(self) -> Model:
        """Make the fake model, without a text encoder: `runtime.rehearsal.phases` makes one when needed."""
        config, dtype = self.config, self.config.dtype.computed
        present = [one for one in self.profile.experts if one.present]
        with self.fake.running():
            make = partial(FakeOffload, self.fake.ledger)
            self._offload = open_offload(config.memory, len(present), DEVICE, make)
        self.parameters = 0
        experts = tuple(map(self._make_expert, present))
        if self._offload is not None:
            with self.fake.running():
                self._offload.open()
                experts[0].adapter.expect()
        freed = config.model_copy(update={"memory": Memory(text_encoder="free")})
        text = PromptEncoder(self.model, freed, self.ranks, dtype)
        self._vae = self._make_vae() if config.memory.vae == "keep" else None
        decoder = WanDecoder(self._vae, config, self.ranks)
        self._image = open_image_encoder(self.model, config, self.ranks, self._transformer, dtype, decoder)
        return Model(experts, text, decoder, self._image, offload=self._offload)

    def _make_expert(self, settings: ExpertSettings) -> Expert:
        dtypes = self.config.dtype
        dtype = dtypes.of("transformer")
        vace = self.kind is ModelKind.VACE
        kind = WanVACETransformer3DModel if vace else WanTransformer3DModel
        model = diffusers_module(self.fake, kind, self.model.path / settings.name, dtype)
        self.parameters += sum(one.numel() for one in model.parameters())
        stored, node = model.state_dict(keep_vars=True), self.ranks.node
        sizes = {name: weight_bytes(one.shape, one.dtype) for name, one in stored.items()}
        reader_of = readers(sizes, node.size)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            node.broadcast(tensor, reader_of.get(name, 0))
        self._change_blocks(model)
        precision = Precision(dtype, dtypes.computed, (*model._keep_in_fp32_modules, SCALES))
        with self.fake.running() as ledger:
            weights = self._place(model)
            with ledger.as_weights():
                precision.convert(model, every_block(model))
        weights = precision.visiting(weights)
        if not self.whole:
            weights = RepeatedBlocks(weights, self.fake.ledger, self.ranks)
        self._transformer: Transformer = model  # all have the same settings
        adapter = open_adapter(model, weights, dtypes.computed, by_token=self.knows_frames)
        overlaps = self.config.performs.overlap_exchanges
        return Expert(settings, adapter, SelfAttention(model, overlaps=overlaps), model)

    def _change_blocks(self, model: Transformer) -> None:
        """Change the blocks as they are when they are loaded, for example quantise them."""
        quantization = self.config.performs.quantization
        if quantization == "fp8" and self._gpu.fp8_tflops is None:
            raise BadRequestError(f"quantization: {quantization!r} given; {self._gpu.name} has no fp8")
        change = change_of_blocks(self.config)
        with self.fake.running() as ledger, ledger.as_weights():
            for block in every_block(model):
                change(block)

    def _check_room(self, request: VideoRequest, tokens: int) -> None:
        """Check nothing: a rehearsal reports whether the job fits."""

    def _kernel(self, ring: int) -> str:
        """Name of the attention kernel that would run on the GPU."""
        name, dtype = self.config.attention, self.loaded.dtype
        if name == AUTO:
            card = Card(_HOPPER, GOOD_CUDNN) if self._gpu.cudnn else None
            return choose(DEVICE, dtype, ring, card, fastest=self.config.performs.fastest_attention)
        if name.startswith("xfuser"):
            raise BadRequestError(f"attention: {name!r} given; only torch's own kernels can be rehearsed")
        return resolve(name, DEVICE, dtype, ring=ring)

    def _place(self, model: Transformer) -> Weights:
        """Put a transformer's blocks where the config wants them; called within `fake.running`."""
        if self._offload is not None:
            for position, block in enumerate(every_block(model)):
                self._offload.add(block, position)
            return self._offload
        if self.config.memory.transformer != "shard" or self.ranks.size == 1:
            return WholeWeights()
        assert isinstance(self.ranks.everyone, FakePeers)
        shares = FakeShards(self.ranks.everyone, self.fake.ledger)
        for block in every_block(model):
            shares.shard(block)
        return shares

    def _make_vae(self) -> AutoencoderKLWan | None:
        if self.config.decoding == "whole" and not self.ranks.is_leader:
            return None
        path, dtype = self.model.path / "vae", self.config.dtype.of("vae")
        vae: AutoencoderKLWan = diffusers_module(self.fake, AutoencoderKLWan, path, dtype)
        if not self.whole:
            vae.decoder = RepeatedChunks(vae.decoder, self.fake.ledger, self.ranks)
            vae.encoder = RepeatedChunks(vae.encoder, self.fake.ledger, self.ranks)
        return vae

    def _embeddings(self, request: VideoRequest) -> Embeddings:
        """Make fake embeddings of the prompts."""
        shape = (request.videos, request.max_sequence_length, self._transformer.config.text_dim)
        made = [
            torch.empty(shape, dtype=self.loaded.dtype, device=DEVICE)
            for _ in range(1 + len(request.travel) + request.guided)
        ]
        count = 1 + len(request.travel)
        return Embeddings(made[:count], made[count] if request.guided else None)

    def _condition(self, plan: Plan, window_BCFHW: torch.Tensor) -> Condition | None:
        """Make the fake conditioning of a window; None for a model that is conditioned on text alone."""
        if self._image is None:
            return None
        settings, (batch, channels, *rest) = self._transformer.config, window_BCFHW.shape
        if self.knows_frames:
            known = 0 if plan.request.image is None else 1
            return self._image.condition(channels, torch.empty_like(window_BCFHW[:, :, :known]))
        if self.kind is ModelKind.VACE:
            total, tokens = settings.vace_in_channels, []
        else:
            total, seen = settings.in_channels - channels, (batch, self.image_tokens, settings.image_dim)
            tokens = [seen] if self.sees_image_tokens else []
        shapes = [(batch, total, *rest), *tokens]
        made = [torch.empty(shape, dtype=self.loaded.dtype, device=DEVICE) for shape in shapes]
        return self._image.condition(channels, *made)

    @property
    def knows_frames(self) -> bool:
        """Whether an image is known frames; see `runtime.models.wan.folder.knows_frames`."""
        return knows_frames(self.model.path)

    @property
    def sees_image_tokens(self) -> bool:
        """Whether the transformers attend to the output of an image encoder."""
        return read_transformer(self.model.path).sees_image_tokens

    @property
    def image_tokens(self) -> int:
        """Number of the image encoder's tokens: one for each patch and one for the whole image; 0 without."""
        if not self.sees_image_tokens:
            return 0
        from runtime.models.wan.settings import ImageEncoderSettings

        found = ImageEncoderSettings.read(self.model.path / "image_encoder" / "config.json")
        return (found.image_size // found.patch_size) ** 2 + 1
