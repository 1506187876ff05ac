"""Three checkpoints, steps 100, 200 and 300, of every code base that ``docs/reference.md`` lists, as it saves them."""

from __future__ import annotations

import argparse
import dataclasses
import io
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from tests.checkpoints import nvlabs_examples
from tests.unet_examples import unet

STEPS = (100, 200, 300)
Weights = dict[str, Tensor]


def net(seed: int) -> nn.Module:
    """Parameters, a buffer and a number."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Sequential(nn.Linear(3, 2)))


def weights(seed: int) -> Weights:
    return dict(net(seed).state_dict())


def prefixed(prefix: str, seed: int) -> Weights:
    return {f"{prefix}{name}": tensor for name, tensor in weights(seed).items()}


def optimizer_state() -> dict[str, Any]:
    model = net(0)
    optimizer = torch.optim.Adam(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    return optimizer.state_dict()


def saved(path: Path, content: Any, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(content, path, **options) if path.suffix == ".safetensors" else torch.save(content, path, **options)
    return path


# each saves what a code base leaves at one step, and returns the weights that a reader must find there


def bare(folder: Path, step: int) -> Weights:
    torch.save(prefixed("module.", step), folder / f"weights_{step}.pth")
    return weights(step)


def torchscript(folder: Path, step: int) -> Weights:
    write_script(step, folder / f"script_{step}.pt")
    return weights(step)


def write_script(seed: int, path: Path) -> None:
    """Traced, as OpenAI's CLIP is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, of its own future
        torch.jit.save(torch.jit.trace(net(seed).eval(), torch.zeros(1, 2, 5, 5)), path)


def nested(folder: Path, step: int) -> Weights:
    args = argparse.Namespace(lr=1e-4, out=Path("runs"), seed=np.int64(3))
    content = {"model": weights(step + 1), "ema": weights(step), "opt": optimizer_state(), "args": args}
    torch.save(content, folder / f"{step:07d}.pt")
    return weights(step)


def openai(folder: Path, step: int) -> Weights:
    torch.save(weights(step + 1), folder / f"model{step:06d}.pt")
    torch.save(weights(step + 2), folder / f"ema_0.999_{step:06d}.pt")
    torch.save(weights(step), folder / f"ema_0.9999_{step:06d}.pt")
    torch.save(optimizer_state(), folder / f"opt{step:06d}.pt")
    return weights(step)


def ddim(folder: Path, step: int) -> Weights:
    content = [prefixed("module.", step + 1), optimizer_state(), 3, step, weights(step)]
    torch.save(content, folder / f"ckpt_{step}.pth")
    return weights(step)


def score_sde(folder: Path, step: int) -> Weights:
    averaged = {name: tensor.detach() for name, tensor in net(step + 1).named_parameters()}
    ema = {"decay": 0.999, "num_updates": step, "shadow_params": list(averaged.values())}
    content = {"optimizer": optimizer_state(), "model": prefixed("module.", step), "ema": ema, "step": step}
    torch.save(content, folder / f"checkpoint_{step // 100}.pth")
    return averaged


def lucidrains(folder: Path, step: int) -> Weights:
    ema = {"initted": torch.tensor(True), "step": torch.tensor(step)}
    ema |= prefixed("online_model.", step + 1) | prefixed("ema_model.", step)
    content = {"step": step, "model": weights(step + 1), "opt": optimizer_state(), "ema": ema, "scaler": None}
    torch.save(content, folder / f"model-{step // 100}.pt")
    return weights(step)


def imagen(folder: Path, step: int) -> Weights:
    """One U-Net of a cascade, whose averages are in a list of modules."""
    ema = {"0.initted": torch.tensor(True), "0.step": torch.tensor(step)}
    ema |= prefixed("0.online_model.", step + 1) | prefixed("0.ema_model.", step)
    content = {"model": prefixed("unets.0.", step + 1), "steps": torch.tensor([step]), "ema": ema}
    torch.save(content, folder / f"checkpoint.{step}.pt")
    return prefixed("unets.0.", step)


def jit(folder: Path, step: int) -> Weights:
    """As ``util/misc.py`` of JiT saves it, and the code bases that began with it; numbers in names are epochs."""
    model = {"model": prefixed("net.", step + 1), "optimizer": optimizer_state(), "epoch": step}
    averages = {"model_ema1": prefixed("net.", step), "model_ema2": prefixed("net.", step + 2)}
    content = model | averages | {"args": argparse.Namespace(ema_decay1=0.9999, ema_decay2=0.9996)}
    torch.save(content, folder / f"checkpoint-{step}.pth")
    torch.save(content, folder / "checkpoint-last.pth")
    return prefixed("net.", step)


def monai(folder: Path, step: int) -> Weights:
    """Its ``CheckpointSaver``, with ``save_final`` and ``save_key_metric``; ignite's handler writes the optimizer's."""
    content = {"net": weights(step + 1), "opt": optimizer_state(), "ema": weights(step)}
    torch.save(content, folder / f"checkpoint_epoch={step}.pt")
    torch.save(content, folder / "checkpoint_final_iteration=9000.pt")
    torch.save(content, folder / f"checkpoint_key_metric=-{step / 1e4:.4f}.pt")
    torch.save(optimizer_state(), folder / f"opt_checkpoint_epoch={step}.pt")
    return weights(step)


def compvis(folder: Path, step: int) -> Weights:
    names = prefixed("model.", step + 1)
    names |= {f"model_ema.{name.replace('.', '')}": tensor for name, tensor in weights(step).items()}
    names |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(step)}
    torch.save({"epoch": 1, "global_step": step, "state_dict": names}, folder / f"epoch={step // 100:06d}.ckpt")
    return weights(step)


def edm(folder: Path, step: int) -> Weights:
    network = nvlabs_examples.network(step)
    nvlabs_examples.write_training_state(folder / f"training-state-{step:06d}.pt", network)
    return nvlabs_examples.write_snapshot(folder / f"network-snapshot-{step:06d}.pkl", network)


def edm2(folder: Path, step: int) -> Weights:
    for seed, std in ((step + 1, "0.050"), (step, "0.100")):
        path = folder / f"network-snapshot-{step:07d}-{std}.pkl"
        written = nvlabs_examples.write_snapshot(path, nvlabs_examples.network(seed), half=True)
    return written


def lightning(folder: Path) -> dict[int, Weights]:
    """Written by Lightning itself, with its averaging callback: the average is the ``state_dict``."""
    lightning_module = pytest.importorskip("pytorch_lightning")
    from pytorch_lightning.callbacks import LambdaCallback, ModelCheckpoint

    class Module(lightning_module.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self, config: Any, rate: float = 0.01) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.model = net(1)

        def training_step(self, batch: Tensor) -> Tensor:
            return self.model[2](batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.5)

    written: dict[int, Weights] = {}

    def remember(trainer: Any, module: Any, *_: Any) -> None:
        state = module.model.state_dict()
        written[trainer.global_step] = {name: tensor.detach().clone() for name, tensor in state.items()}

    saver = ModelCheckpoint(folder, filename="{epoch}-{step}", every_n_train_steps=100, save_top_k=-1)
    config = argparse.Namespace(path=Path("data"), kind=nn.Linear)
    loader = torch.utils.data.DataLoader(list(torch.ones(400, 3)), batch_size=1)  # type: ignore[arg-type]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its advice depends on the machine: cores, SLURM
        callbacks = [saver, LambdaCallback(on_train_batch_end=remember)]
        trainer = lightning_module.Trainer(max_steps=300, accelerator="cpu", callbacks=callbacks, **quiet)
        trainer.fit(Module(config), loader)
    return {step: written[step] for step in STEPS}


def accelerate(folder: Path, step: int) -> Weights:
    """Written by Accelerate itself."""
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    model = net(step)
    accelerator.prepare(model, torch.optim.Adam(model.parameters()))
    accelerator.save_state(str(folder / f"checkpoint_{step}"))
    return weights(step)


class _Halves(DefaultSavePlanner):  # type: ignore[misc]
    """Cuts each tensor in two along its first axis, as two processes of FSDP would."""

    def create_local_plan(self) -> SavePlan:
        whole, items = super().create_local_plan(), []
        for item in whole.items:
            tensor = self.state_dict[item.index.fqn]
            if item.tensor_data is None or not tensor.ndim:
                items.append(item)
                continue
            for first, last in ((0, len(tensor) // 2), (len(tensor) // 2, len(tensor))):
                offsets = torch.Size([first, *[0] * (tensor.ndim - 1)])
                chunk = ChunkStorageMetadata(offsets, torch.Size([last - first, *tensor.shape[1:]]))
                data = dataclasses.replace(item.tensor_data, chunk=chunk)
                items.append(WriteItem(MetadataIndex(item.index.fqn, offsets), WriteItemType.SHARD, tensor_data=data))
        self.plan = dataclasses.replace(whole, items=items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.type != WriteItemType.SHARD or write_item.tensor_data is None:
            return super().resolve_data(write_item)
        chunk, whole = write_item.tensor_data.chunk, self.state_dict[write_item.index.fqn]
        return whole[chunk.offsets[0] : chunk.offsets[0] + chunk.sizes[0]].detach() if whole.ndim else whole.detach()


def write_distributed(folder: Path, content: Any, **options: Any) -> None:
    """Written by torch itself, in two files with half of each tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process only
        writer = FileSystemWriter(folder, thread_count=2, **options)
        torch.distributed.checkpoint.save(content, storage_writer=writer, planner=_Halves(), no_dist=True)


def distributed(folder: Path, step: int) -> Weights:
    """What a training with FSDP leaves: the model, its optimizer's states, and numbers."""
    content = {"model": weights(step), "optimizer": optimizer_state(), "step": step}
    write_distributed(folder / f"checkpoint-{step}", content)
    return weights(step)


def diffusers_training(folder: Path, step: int) -> Weights:
    """What diffusers' training scripts leave: the model, and its ``EMAModel``, both by their ``save_pretrained``."""
    from diffusers.training_utils import EMAModel

    model, averaged = unet(step), unet(step + 1)
    ema = EMAModel(averaged.parameters(), model_cls=type(model), model_config=model.config)
    model.save_pretrained(folder / f"checkpoint-{step}" / "unet")
    ema.save_pretrained(folder / f"checkpoint-{step}" / "unet_ema")
    torch.save(optimizer_state(), folder / f"checkpoint-{step}" / "optimizer.bin")
    return dict(averaged.state_dict())


def diffusers_pipelines(folder: Path, step: int) -> Weights:
    """Whole pipelines, saved by diffusers in half precision under a variant's name."""
    from diffusers import DDPMPipeline, DDPMScheduler

    model = unet(step).half()
    pipeline = DDPMPipeline(unet=model, scheduler=DDPMScheduler())
    pipeline.save_pretrained(folder / f"pipeline-{step}", variant="fp16")
    return dict(model.state_dict())


def sharded(folder: Path, step: int) -> Weights:
    """Weights cut into several files by diffusers."""
    model = unet(step)
    model.save_pretrained(folder / f"checkpoint-{step}" / "transformer", max_shard_size="20KB")
    return dict(model.state_dict())


def lora(folder: Path, step: int) -> Weights:
    """LoRA factors are ordinary tensors here."""
    generator = torch.Generator().manual_seed(step)
    factors = {
        "lora_unet_mid_block.lora_down.weight": torch.randn(2, 6, generator=generator),
        "lora_unet_mid_block.lora_up.weight": torch.randn(6, 2, generator=generator),
        "lora_unet_mid_block.alpha": torch.tensor(2.0),
    }
    save_file(factors, folder / f"lora-{step // 100:06d}.safetensors", metadata={"ss_steps": str(step)})
    return factors


def stable_baselines3(folder: Path, step: int) -> Weights:
    """A zip of files of torch, with the settings of the run beside them."""
    with zipfile.ZipFile(folder / f"rl_model_{step}_steps.zip", "w") as archive:
        archive.writestr("data", "{}")
        for name, content in (("policy.pth", weights(step)), ("policy.optimizer.pth", optimizer_state())):
            torch.save(content, written := io.BytesIO())
            archive.writestr(name, written.getvalue())
    return weights(step)


def tianshou(folder: Path, step: int) -> Weights:
    """An algorithm's state dict has the states of its optimizers, too."""
    algorithm = {**weights(step), "_optimizers": [optimizer_state()]}
    torch.save({"algorithm": algorithm}, folder / f"checkpoint_{step}.pth")
    return weights(step)


def scvi_tools(folder: Path, step: int) -> Weights:
    """A model's folder: its weights, the names of its genes, and how it was made."""
    content = {
        "model_state_dict": weights(step),
        "var_names": np.array(["gene_0", "gene_1"]),
        "attr_dict": {"is_trained_": True, "init_params_": {"kwargs": {}}},
    }
    saved(folder / f"epoch={step // 100}-step={step}" / "model.pt", content)
    return weights(step)


def rectified_flow(folder: Path, step: int) -> Weights:
    for name, seed in (("model", step), ("ema", step + 1)):
        saved(folder / f"checkpoint-{step}" / f"unet_{name}.pt", weights(seed))
    return weights(step + 1)


def safetensors(folder: Path, step: int) -> Weights:
    typed = weights(step)
    typed["bfloat"] = typed["0.weight"].to(torch.bfloat16)
    typed["float8"] = torch.tensor([0.5, -2.0]).to(torch.float8_e4m3fn)
    typed["double"] = typed["0.bias"].double()
    save_file(typed, folder / f"model_{step}_bf16.safetensors", metadata={"format": "pt"})
    return typed


EXAMPLES: dict[str, Callable[[Path, int], Weights]] = {
    "PyTorch, bare": bare,
    "TorchScript (OpenAI's CLIP)": torchscript,
    "PyTorch, nested (DiT, SiT, your own loop)": nested,
    "consistency_models, improved-diffusion, guided-diffusion": openai,
    "DDIM": ddim,
    "score_sde, torch-ema": score_sde,
    "denoising-diffusion-pytorch, ema-pytorch": lucidrains,
    "imagen-pytorch": imagen,
    "JiT, RiT, JLT": jit,
    "MONAI, ignite": monai,
    "latent-diffusion (CompVis)": compvis,
    "NVlabs EDM": edm,
    "NVlabs EDM2": edm2,
    "stable-baselines3": stable_baselines3,
    "tianshou": tianshou,
    "scvi-tools": scvi_tools,
    "rectified-flow": rectified_flow,
    "Accelerate": accelerate,
    "diffusers training": diffusers_training,
    "diffusers pipelines": diffusers_pipelines,
    "Weights in several files": sharded,
    "torch.distributed.checkpoint (FSDP, Accelerate, torchtitan, Megatron-LM)": distributed,
    "LoRA (diffusers, PEFT, kohya)": lora,
    "safetensors": safetensors,
}
NAMES = ["Lightning", *EXAMPLES]


def write(name: str, folder: Path) -> dict[int, Weights]:
    """Write an example, and return what a reader must find: step → weights."""
    folder.mkdir()
    return lightning(folder) if name == "Lightning" else {step: EXAMPLES[name](folder, step) for step in STEPS}
