"""Three checkpoints of every code base that ``docs/formats.md`` lists, at steps 100, 200 and 300, as it saves them.

A builder writes them into a folder and returns what a reader must find: step → weights.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.checkpoints import nvlabs_examples

STEPS = (100, 200, 300)
Written = dict[int, dict[str, Tensor]]


def net(seed: int) -> nn.Module:
    """Parameters, a buffer and a number."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Sequential(nn.Linear(3, 2)))


def weights(seed: int) -> dict[str, Tensor]:
    return dict(net(seed).state_dict())


def optimizer_state() -> dict[str, Any]:
    model = net(0)
    optimizer = torch.optim.Adam(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    return optimizer.state_dict()


def _each(folder: Path, save: Callable[[int, dict[str, Tensor]], object]) -> Written:
    folder.mkdir(parents=True, exist_ok=True)
    written = {step: weights(step) for step in STEPS}
    for step, state in written.items():
        save(step, state)
    return written


def bare(folder: Path) -> Written:
    def save(step: int, state: dict[str, Tensor]) -> None:
        torch.save({f"module.{name}": tensor for name, tensor in state.items()}, folder / f"weights_{step}.pth")

    return _each(folder, save)


def torchscript(folder: Path) -> Written:
    return _each(folder, lambda step, _: write_script(step, folder / f"script_{step}.pt"))


def write_script(seed: int, path: Path) -> None:
    """Traced, as OpenAI's CLIP is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, of its own future
        torch.jit.save(torch.jit.trace(net(seed).eval(), torch.zeros(1, 2, 5, 5)), path)


def nested(folder: Path) -> Written:
    def save(step: int, state: dict[str, Tensor]) -> None:
        args = argparse.Namespace(lr=1e-4, out=Path("runs"), seed=np.int64(3))
        torch.save(
            {"model": weights(step + 1), "ema": state, "opt": optimizer_state(), "args": args},
            folder / f"{step:07d}.pt",
        )

    return _each(folder, save)


def openai(folder: Path) -> Written:
    def save(step: int, state: dict[str, Tensor]) -> None:
        torch.save(weights(step + 1), folder / f"model{step:06d}.pt")
        torch.save(weights(step + 2), folder / f"ema_0.999_{step:06d}.pt")
        torch.save(state, folder / f"ema_0.9999_{step:06d}.pt")
        torch.save(optimizer_state(), folder / f"opt{step:06d}.pt")

    return _each(folder, save)


def ddim(folder: Path) -> Written:
    def save(step: int, state: dict[str, Tensor]) -> None:
        model = {f"module.{name}": tensor for name, tensor in weights(step + 1).items()}
        torch.save([model, optimizer_state(), 3, step, state], folder / f"ckpt_{step}.pth")

    return _each(folder, save)


def score_sde(folder: Path) -> Written:
    written = {}
    folder.mkdir(parents=True, exist_ok=True)
    for index, step in enumerate(STEPS):
        model, averaged = net(step), dict(net(step + 1).named_parameters())
        shadow = [tensor.detach() for tensor in averaged.values()]
        ema = {"decay": 0.999, "num_updates": step, "shadow_params": shadow}
        state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
        content = {"optimizer": optimizer_state(), "model": state, "ema": ema, "step": step}
        torch.save(content, folder / f"checkpoint_{index + 1}.pth")
        written[step] = {name: tensor.detach() for name, tensor in averaged.items()}
    return written


def lucidrains(folder: Path) -> Written:
    def save(step: int, state: dict[str, Tensor]) -> None:
        ema = {"initted": torch.tensor(True), "step": torch.tensor(step)}
        ema |= {f"online_model.{name}": tensor for name, tensor in weights(step + 1).items()}
        ema |= {f"ema_model.{name}": tensor for name, tensor in state.items()}
        content = {"step": step, "model": weights(step + 1), "opt": optimizer_state(), "ema": ema, "scaler": None}
        torch.save(content, folder / f"model-{step // 100}.pt")

    return _each(folder, save)


def compvis(folder: Path) -> Written:
    def save(step: int, state: dict[str, Tensor]) -> None:
        names = {f"model.{name}": tensor for name, tensor in weights(step + 1).items()}
        names |= {f"model_ema.{name.replace('.', '')}": tensor for name, tensor in state.items()}
        names |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(step)}
        torch.save({"epoch": 1, "global_step": step, "state_dict": names}, folder / f"epoch={step // 100:06d}.ckpt")

    return _each(folder, save)


def edm(folder: Path) -> Written:
    folder.mkdir(parents=True, exist_ok=True)
    for step in STEPS:
        nvlabs_examples.write_training_state(folder / f"training-state-{step:06d}.pt", nvlabs_examples.network(step))
    return {
        step: nvlabs_examples.write_snapshot(folder / f"network-snapshot-{step:06d}.pkl", nvlabs_examples.network(step))
        for step in STEPS
    }


def edm2(folder: Path) -> Written:
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for step in STEPS:
        for seed, std in ((step + 1, "0.050"), (step, "0.100")):
            path = folder / f"network-snapshot-{step:07d}-{std}.pkl"
            written[step] = nvlabs_examples.write_snapshot(path, nvlabs_examples.network(seed), half=True)
    return written


def lightning(folder: Path) -> Written:
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

    written: Written = {}

    def remember(trainer: Any, module: Any, *_: Any) -> None:
        state = module.model.state_dict()
        written[trainer.global_step] = {name: tensor.detach().clone() for name, tensor in state.items()}

    saver = ModelCheckpoint(folder, filename="{epoch}-{step}", every_n_train_steps=100, save_top_k=-1)
    config = argparse.Namespace(path=Path("data"), kind=nn.Linear)
    loader = torch.utils.data.DataLoader(list(torch.ones(400, 3)), batch_size=1)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its advice depends on the machine: cores, SLURM
        trainer = lightning_module.Trainer(
            max_steps=300,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[saver, LambdaCallback(on_train_batch_end=remember)],
        )
        trainer.fit(Module(config), loader)
    return {step: written[step] for step in STEPS}


def accelerate(folder: Path) -> Written:
    """Written by Accelerate itself."""
    accelerate_library = pytest.importorskip("accelerate")
    accelerator = accelerate_library.Accelerator(cpu=True)

    def save(step: int, state: dict[str, Tensor]) -> None:
        model = net(step)
        optimizer = torch.optim.Adam(model.parameters())
        accelerator._models.clear()
        accelerator._optimizers.clear()
        accelerator.prepare(model, optimizer)
        accelerator.save_state(str(folder / f"checkpoint_{step}"))

    return _each(folder, save)


def unet(seed: int) -> Any:
    from diffusers import UNet2DModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DModel(
            sample_size=8,
            block_out_channels=(8,),
            norm_num_groups=4,
            layers_per_block=1,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
        )


def diffusers_training(folder: Path) -> Written:
    """What diffusers' training scripts leave: the model, and its ``EMAModel``, both by their ``save_pretrained``."""
    written = {}
    for step in STEPS:
        model, averaged = unet(step), unet(step + 1)
        from diffusers.training_utils import EMAModel

        ema = EMAModel(averaged.parameters(), model_cls=type(model), model_config=model.config)
        model.save_pretrained(folder / f"checkpoint-{step}" / "unet")
        ema.save_pretrained(folder / f"checkpoint-{step}" / "unet_ema")
        torch.save(optimizer_state(), folder / f"checkpoint-{step}" / "optimizer.bin")
        written[step] = dict(averaged.state_dict())
    return written


def diffusers_pipelines(folder: Path) -> Written:
    """Whole pipelines, saved by diffusers in half precision under a variant's name."""
    written = {}
    for step in STEPS:
        model = unet(step).half()
        from diffusers import DDPMPipeline, DDPMScheduler

        pipeline = DDPMPipeline(unet=model, scheduler=DDPMScheduler())
        pipeline.save_pretrained(folder / f"pipeline-{step}", variant="fp16")
        written[step] = dict(model.state_dict())
    return written


def sharded(folder: Path) -> Written:
    """Weights cut into several files by diffusers."""
    written = {}
    for step in STEPS:
        model = unet(step)
        model.save_pretrained(folder / f"checkpoint-{step}" / "transformer", max_shard_size="8KB")
        written[step] = dict(model.state_dict())
    return written


def lora(folder: Path) -> Written:
    """LoRA factors are ordinary tensors here."""

    def save(step: int, _: dict[str, Tensor]) -> None:
        save_file(factors(step), folder / f"lora-{step // 100:06d}.safetensors", metadata={"ss_steps": str(step)})

    _each(folder, save)
    return {step: factors(step) for step in STEPS}


def factors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "lora_unet_mid_block.lora_down.weight": torch.randn(2, 6, generator=generator),
        "lora_unet_mid_block.lora_up.weight": torch.randn(6, 2, generator=generator),
        "lora_unet_mid_block.alpha": torch.tensor(2.0),
    }


def safetensors(folder: Path) -> Written:
    def typed(step: int) -> dict[str, Tensor]:
        state = weights(step)
        return {
            **state,
            "bfloat": state["0.weight"].to(torch.bfloat16),
            "float8": torch.tensor([0.5, -2.0]).to(torch.float8_e4m3fn),
            "double": state["0.bias"].double(),
        }

    def save(step: int, _: dict[str, Tensor]) -> None:
        save_file(typed(step), folder / f"model_{step}_bf16.safetensors", metadata={"format": "pt"})

    _each(folder, save)
    return {step: typed(step) for step in STEPS}


EXAMPLES: dict[str, Callable[[Path], Written]] = {
    "PyTorch, bare": bare,
    "TorchScript (OpenAI's CLIP)": torchscript,
    "PyTorch, nested (DiT, SiT, your own loop)": nested,
    "consistency_models, improved-diffusion, guided-diffusion": openai,
    "DDIM": ddim,
    "score_sde, torch-ema": score_sde,
    "denoising-diffusion-pytorch, ema-pytorch": lucidrains,
    "latent-diffusion (CompVis)": compvis,
    "NVlabs EDM": edm,
    "NVlabs EDM2": edm2,
    "Lightning": lightning,
    "Accelerate": accelerate,
    "diffusers training": diffusers_training,
    "diffusers pipelines": diffusers_pipelines,
    "Weights in several files": sharded,
    "LoRA (diffusers, PEFT, kohya)": lora,
    "safetensors": safetensors,
}
