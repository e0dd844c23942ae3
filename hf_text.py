"""Text towers of Hugging Face's transformers, which is optional and imported when first used.

Shapes: B batch, L tokens, W width of the tower, D joint embedding.
"""

from torch import nn

from infra import checkpoint, weights
from infra.untrusted import named_failures
from layers import Layers
from utils import InputError


def load_transformers():
    """The package. Raises InputError if it is not installed."""
    try:
        import transformers
    except ImportError as error:
        text = "text towers of Hugging Face need the package transformers: pip install"
        raise InputError(f"{text} transformers") from error
    return transformers


class HFText(nn.Module):
    """A text tower of transformers, pooled over its tokens, and a projection of two layers.

    As open_clip's HFTextEncoder. Its methods are those of towers.TextTower.
    """

    def __init__(self, tower):
        super().__init__()
        self.source, package = tower.text_model, load_transformers()
        with named_failures(f"text model {self.source.name}"):
            config = package.AutoConfig.for_model(**self.source.config, use_cache=False)
            self.transformer = package.AutoModel.from_config(config, add_pooling_layer=False)
        self.padding, self.vocabulary = config.pad_token_id, config.vocab_size
        # All but BERT leave out the positions up to the padding's id.
        used = 0 if config.model_type == "bert" else self.padding + 1
        if config.max_position_embeddings - used < tower.preprocessing.context_length:
            raise InputError(
                f"text model {self.source.name} has {config.max_position_embeddings - used} "
                f"positions for {tower.preprocessing.context_length} tokens; choose another"
            )
        width, hidden = config.hidden_size, (config.hidden_size + tower.embed_dim) // 2
        self.proj = nn.Sequential(
            nn.Linear(width, hidden, bias=False),
            nn.GELU(),
            nn.Linear(hidden, tower.embed_dim, bias=False),
        )

    def load_pretrained(self):
        """Loads the weights of the text model's folder; returns notes, [] if it has no folder."""
        if not self.source.weights:
            note = f"text tower {self.source.name}: its folder has no weights, they are random"
            return [] if self.source.weights is None else [note]
        prefix, own = f"{self.transformer.base_model_prefix}.", self.transformer.state_dict()
        state = {
            key.removeprefix(prefix).replace(".gamma", ".weight").replace(".beta", ".bias"): value
            for key, value in weights.read(self.source.weights).tensors.items()
        }
        state = {key: value for key, value in state.items() if key in own}  # without heads
        checkpoint.load_weights(self.transformer, state, self.source.weights, "its configuration")
        return [f"text tower {self.source.name}: pretrained weights, {self.source.weights}"]

    def text_layers(self):
        names, prefix = [name for name, _ in self.transformer.named_parameters()], "encoder.layer."
        stem = [f"text.transformer.{name}" for name in names if not name.startswith(prefix)]
        number = len(self.transformer.encoder.layer)
        blocks = [[f"text.transformer.{prefix}{i}"] for i in range(number)]
        return Layers(stem, blocks, [], ["text.proj"], locks_projection=False)

    def forward_text(self, text):
        """(B, L) token ids -> (B, W), the mean over the tokens that are no padding."""
        mask = text != self.padding  # (B, L)
        x = self.transformer(input_ids=text, attention_mask=mask.long()).last_hidden_state
        mask = mask.unsqueeze(-1).to(x.dtype)  # (B, L, 1)
        return (x * mask).sum(1) / mask.sum(1).clamp(min=1)

    def project_text(self, x):
        """(B, W) -> (B, D)."""
        return self.proj(x)

    def text_blocks(self):
        """The modules to compile."""
        return list(self.transformer.encoder.layer)

    def set_text_checkpointing(self):
        older = self.transformer.gradient_checkpointing_enable  # the name until it was renamed
        enable = getattr(self.transformer, "activation_checkpointing_enable", older)
        enable({"use_reentrant": False})
