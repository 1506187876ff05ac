"""Damaged checkpoints: each reads as tensors or is answered with one line, within 10 s and 500 MB; nothing runs."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoints import nvlabs_examples
from tests.checkpoints.checkpoint_examples import optimizer_state, weights, write_script
from tests.checkpoints.read_in_a_child import in_a_child

FILES = 160
SECONDS, MEGABYTES = 10.0, 500.0


def originals(folder: Path) -> list[Path]:
    """One good file of every container."""
    ema, model = weights(1), weights(2)
    content = {"model": model, "ema": ema, "step": 3, "opt": optimizer_state()}
    torch.save(content, folder / "new.pt")
    torch.save(content, folder / "old.pth", _use_new_zipfile_serialization=False)
    torch.save([model, optimizer_state(), 1, 2, ema], folder / "ddim.ckpt")
    write_script(1, folder / "script.pt")
    foreign = {"state_dict": model, "hyper_parameters": {"path": Path("data"), "seen": {1, 2}}}
    torch.save(foreign, folder / "lightning.ckpt")
    save_file(model, folder / "model.safetensors", metadata={"step": "3"})
    nvlabs_examples.write_snapshot(folder / "network-snapshot-000001.pkl", nvlabs_examples.network(1))
    nvlabs_examples.write_training_state(folder / "training-state-000001.pt", nvlabs_examples.network(1))
    save_file(model, folder / "part.safetensors")
    index = {"metadata": {"total_size": 9}, "weight_map": dict.fromkeys(model, "part.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return [path for path in sorted(folder.iterdir()) if path.name != "part.safetensors"]


def flip_bits_in_the_structure(content: bytearray, rng: random.Random) -> bytearray:
    """Where pickles, headers and directories are, not in the weights."""
    for _ in range(rng.choice([1, 2, 8])):
        place = rng.randrange(min(3000, len(content)))
        content[place if rng.random() < 0.7 else -1 - place] ^= 1 << rng.randrange(8)
    return content


def truncate(content: bytearray, rng: random.Random) -> bytearray:
    return content[: rng.randrange(1, len(content))]


def put_in_a_number(content: bytearray, rng: random.Random) -> bytearray:
    """Lengths, offsets and counts become extreme."""
    value = rng.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1])
    place = rng.randrange(min(4000, max(len(content) - 8, 1)))
    size = rng.choice("IQ")
    packed = struct.pack(f"<{size}", value % 2 ** (32 if size == "I" else 64))
    content[place : place + len(packed)] = packed
    return content


def damage_the_pickle(content: bytearray, rng: random.Random) -> bytearray:
    """Opcodes are exchanged in the pickle of a zip, which is put together again as torch would."""
    if not content.startswith(b"PK"):
        return flip_bits_in_the_structure(content, rng)
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(result, "w") as target:
        for name in source.namelist():
            data = bytearray(source.read(name))
            for _ in range(rng.choice([1, 3, 10]) if name.endswith("data.pkl") else 0):
                data[rng.randrange(len(data))] = rng.choice(b"(.0}]\x81\x85\x86\x87\x94NRQbcehjqrstuX\x8a\x8c\x93\xff")
            target.writestr(name, bytes(data))
    return bytearray(result.getvalue())


MUTATIONS: tuple[Callable[[bytearray, random.Random], bytearray], ...] = (
    flip_bits_in_the_structure,
    truncate,
    put_in_a_number,
    damage_the_pickle,
)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "good").mkdir()
    good = originals(folder / "good")
    damaged = []
    for index in range(FILES):
        rng = random.Random(index)
        source, mutate = good[index % len(good)], MUTATIONS[index // len(good) % len(MUTATIONS)]
        place = folder / f"{index:03d}-{mutate.__name__}"
        place.mkdir()
        (place / "part.safetensors").write_bytes((folder / "good" / "part.safetensors").read_bytes())
        (place / source.name).write_bytes(mutate(bytearray(source.read_bytes()), rng))
        damaged.append(place / source.name)
    found = in_a_child([*good, *damaged], warm=good[0])
    assert all(answer["outcome"] == "read" for answer in found[: len(good)])
    return found[len(good) :]


def test_damaged_file_reads_as_tensors_or_is_refused_soon_and_nothing_runs(answers):
    refused = [answer for answer in answers if answer["outcome"] == "refused"]
    assert all("\n" not in answer["message"] and len(answer["message"]) < 600 for answer in refused)
    assert all(str(Path(answer["path"]).parent) in answer["message"] for answer in refused)
    assert 20 < len(refused) < FILES - 20, Counter(answer["outcome"] for answer in answers)  # both do happen
    for answer in answers:
        assert answer["outcome"] in ("read", "refused"), answer
        assert answer["seconds"] < SECONDS, answer
        assert answer["megabytes"] < MEGABYTES, answer
        assert answer["events"] == [], answer
