"""Small networks with random weights, written as the published files are: what the extractors are tested on."""

import contextlib
import re
import warnings

import pytest
import torch
from torch import nn

from lcsc_opt.base.errors import MetricError

SMALL_CLIP = {"embed_dim": 12, "image_resolution": 64, "vision_layers": 2, "vision_width": 64, "vision_patch_size": 32}


@contextlib.contextmanager
def seeded(seed):
    """Other people's layers draw from the global generator; afterwards it is as it was before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


class Clip(nn.Module):
    """What OpenAI's archive holds around the image encoder, smaller."""

    def __init__(self, visual):
        super().__init__()
        self.visual = visual
        self.text_projection = nn.Parameter(torch.randn(8, SMALL_CLIP["embed_dim"]))
        self.logit_scale = nn.Parameter(torch.ones(()))
        self.positional_embedding = nn.Parameter(torch.randn(4, 8))
        self.token_embedding = nn.Embedding(5, 8)
        self.ln_final = nn.LayerNorm(8)
        numbers = torch.tensor([64, 77, 49408])  # parts of one storage
        for i, name in enumerate(("input_resolution", "context_length", "vocab_size")):
            self.register_buffer(name, numbers[i])

    def forward(self, image):
        return self.visual(image) * self.logit_scale.exp() + self.ln_final(self.token_embedding.weight).sum()


def write_clip(path):
    """A TorchScript archive as OpenAI's ``ViT-B-32.pt``, with half-precision weights."""
    from torch_fidelity.feature_extractor_clip import CLIPVisual

    with seeded(1):
        model = Clip(CLIPVisual(**SMALL_CLIP).visual).eval()
    model.half()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of shapes that become constants, and of its own future
        archive = torch.jit.trace(model, torch.zeros(1, 3, 64, 64, dtype=torch.float16))
        torch.jit.save(archive, path)


def refused(path, message=""):
    """One line that begins with the path of the file."""
    return pytest.raises(MetricError, match=rf"^{re.escape(str(path))}[^\n]*{message}[^\n]*$")


def random_inception():
    """torch-fidelity's network with random weights in place of the published ones."""
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    class Unloaded(inception.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict, *args, **kwargs):
            return None

    with seeded(0), pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *a, **k: {})
        network = Unloaded("random", ["2048", "logits_unbiased"])
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)  # its own first weights let the signal fade
        network.fc.weight.data *= 100
        return network


def random_dinov2(image_size=224):
    """transformers' DINOv2 of one block width 64, whose positions are for 224 pixels; random weights."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        image_size=image_size, hidden_size=64, num_attention_heads=1, num_hidden_layers=2, layerscale_value=0.7
    )
    with seeded(2):
        network = transformers.Dinov2Model(config).eval()
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.3)
    return network
