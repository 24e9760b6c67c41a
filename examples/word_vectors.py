# %% [markdown]
# # Missing words first
#
# A sentiment classifier in PyTorch Lightning. Half of its words have pre-trained vectors, the other
# half do not. Those without learn first; from epoch 6 on all words learn, the old ones slowly. The
# data is made here, so that nothing is downloaded.

# %%
import torch
from pytorch_lightning import LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset

from partial_embedding import Vocabulary
from partial_embedding.callbacks.lightning import RowUnfreezing
from partial_embedding.torch import PartialEmbedding

# %% [markdown]
# Words are good, bad or neither, and a text has the sentiment of most of its words. The vectors
# tell good from bad words, as vectors of related texts would; every second word has none.

# %%
seed_everything(0)
NUM_WORDS, WIDTH = 200, 16
sentiment = torch.randint(-1, 2, (NUM_WORDS,))
missing = range(0, NUM_WORDS, 2)

vectors = torch.randn(NUM_WORDS, WIDTH)
vectors[:, 0] += 2 * sentiment
vectors[missing] = 0.1 * torch.randn(len(missing), WIDTH)

texts = torch.randint(NUM_WORDS, (2000, 9))
labels = (sentiment[texts].sum(dim=1) > 0).long()
train, test = slice(0, 1600), slice(1600, None)
vocabulary = Vocabulary(
    [f"word{i}" for i in range(NUM_WORDS)],
    counts=torch.bincount(texts[train].flatten(), minlength=NUM_WORDS),
    missing=missing,
)

# %% [markdown]
# The module is as with `nn.Embedding`; so is its optimizer.


# %%
class Classifier(LightningModule):
    """The mean of word vectors, and a linear layer."""

    def __init__(self, vectors):
        super().__init__()
        self.embedding = PartialEmbedding.from_pretrained(vectors)
        self.head = torch.nn.Linear(WIDTH, 2)

    def forward(self, texts):
        """Logits of the two classes, shape (batch, 2)."""
        return self.head(self.embedding(texts).mean(dim=1))

    def training_step(self, batch, index):
        """Cross entropy."""
        texts, labels = batch
        return torch.nn.functional.cross_entropy(self(texts), labels)

    def configure_optimizers(self):
        """One optimizer over everything."""
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.01)


# %%
schedule = {
    "stages": [
        {"epoch": 0, "rows": "missing"},
        {"epoch": 6, "rows": "all", "lr_scale": 0.1},
    ]
}
model = Classifier(vectors)
trainer = Trainer(
    max_epochs=8,
    callbacks=[RowUnfreezing(schedule, vocabulary=vocabulary, audit=True)],
    gradient_clip_val=1.0,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
)
trainer.fit(model, DataLoader(TensorDataset(texts[train], labels[train]), 32, shuffle=True))

# %%
right = (model(texts[test]).argmax(dim=1) == labels[test]).float().mean()
print(f"accuracy on texts not seen: {right:.1%}")
assert right > 0.8
