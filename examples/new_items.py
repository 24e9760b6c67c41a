"""A recommender gets new items: their rows learn, and what it knew of the others stays, to the bit.

Matrix factorisation in a plain loop. 50 users rate 300 items; then 20 items are new. The data is
made here: users and items have hidden tastes, of which ratings are noisy products.
"""

import torch

from partial_embedding.torch import PartialEmbedding, grow_table

torch.manual_seed(0)
USERS, OLD, NEW, WIDTH = 50, 300, 20, 8
tastes, kinds = torch.randn(USERS, WIDTH), torch.randn(OLD + NEW, WIDTH)


def ratings(items: range, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Users, items and what the ones think of the others."""
    users = torch.randint(USERS, (number,))
    chosen = torch.randint(items.start, items.stop, (number,))
    liked = (tastes[users] * kinds[chosen]).sum(dim=1) + 0.1 * torch.randn(number)
    return users, chosen, liked


def train(
    of_users: torch.nn.Module, of_items: torch.nn.Module, data: tuple[torch.Tensor, ...]
) -> float:
    """Fit the products of vectors to ratings; gives the mean squared error at the end."""
    weights = [*of_users.parameters(), *of_items.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=0.02, weight_decay=0.01)
    for _ in range(30):
        for users, items, liked in zip(*(part.split(256) for part in data), strict=True):
            optimizer.zero_grad()
            error = (of_users(users) * of_items(items)).sum(dim=1) - liked
            error.pow(2).mean().backward()
            torch.nn.utils.clip_grad_norm_(weights, 10.0)
            optimizer.step()
    with torch.no_grad():
        users, items, liked = data
        return ((of_users(users) * of_items(items)).sum(dim=1) - liked).pow(2).mean().item()


# The recommender as it is in use.
of_users = torch.nn.Embedding(USERS, WIDTH)
of_items = PartialEmbedding(OLD, WIDTH)
print(f"error on old items: {train(of_users, of_items, ratings(range(OLD), 8000)):.3f}")
before = of_items.weight.detach().clone()

# New items come: the table gets more rows, of which alone these train. The users stay, too.
of_items.freeze_rows("all")
new_items = grow_table(of_items, None, NEW, init=lambda rows: rows.normal_(std=0.1))
of_users.requires_grad_(False)
error = train(of_users, of_items, ratings(range(OLD, OLD + NEW), 2000))
print(f"error on new items: {error:.3f}")

assert error < 1.0
assert of_items.trainable_rows.tolist() == new_items
assert torch.equal(of_items.weight[:OLD], before)  # no bit of the old items moved
