"""The two policies: which layers to remove, and how far to shrink those that remain (sections 3.1.1, 3.1.2).

Both see a sequence of layers x, (layers, features), and draw the actions of all rollouts of an update in one batched
pass. `sample` draws without gradients; `log_prob` scores drawn actions in one differentiable pass. Actions that change
nothing are masked: they are drawn as "keep as it is" and add nothing to the log-probability.
"""

import torch
from torch import Tensor, nn


class RemovalPolicy(nn.Module):
    """π_remove(a_t | h_{t-1}, h_{t+1}, x_t): a bidirectional LSTM; action 1 keeps a layer, 0 removes it.

    keep_probability: of every layer before any training.
    """

    def __init__(self, features: int, hidden: int = 30, layers: int = 2, keep_probability: float = 0.8) -> None:
        """Draw the initial weights from torch's global generator."""
        super().__init__()
        self.lstm = nn.LSTM(features, hidden, layers, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * hidden, 1)
        nn.init.constant_(self.head.bias, torch.logit(torch.tensor(keep_probability)).item())

    def forward(self, x: Tensor) -> Tensor:
        """x: (layers, features) -> logit of keeping each layer, (layers,)."""
        logits: Tensor = self.head(self.lstm(x[None])[0])
        return logits.flatten()

    @torch.no_grad()
    def sample(self, x: Tensor, mask: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Actions (count, layers) int64; 1 wherever mask, (layers,) bool, is false."""
        keep: Tensor = torch.rand(count, len(x), generator=generator) < self(x).sigmoid()
        return (keep | ~mask).long()

    def log_prob(self, x: Tensor, mask: Tensor, actions: Tensor) -> Tensor:
        """Log-probability of each of the action sequences (count, layers), (count,)."""
        logits = self(x).expand(len(actions), -1)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, actions.to(logits.dtype), reduction="none")
        masked: Tensor = loss * mask
        return -masked.sum(1)


class ShrinkagePolicy(nn.Module):
    """π_shrink(a_t | a_{t-1}, h_{t-1}, x_t): an autoregressive LSTM that draws two ratios for each layer.

    An action is a pair of indices into the ratios, that of the channels and that of the kernel; the last ratio is 1.
    """

    def __init__(self, features: int, ratios: int = 10, hidden: int = 30, layers: int = 2) -> None:
        """Draw the initial weights from torch's global generator."""
        super().__init__()
        self.ratios = ratios
        self.lstm = nn.LSTM(features + 2 * ratios, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, 2 * ratios)

    def forward(
        self, x: Tensor, previous: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x: (steps, features), previous actions: (count, steps, 2) -> log-probabilities (count, steps, 2, ratios)."""
        seen = nn.functional.one_hot(previous, self.ratios).flatten(2).to(x.dtype)
        output, state = self.lstm(torch.cat([x.expand(len(previous), -1, -1), seen], 2), state)
        logits = self.head(output).unflatten(2, (2, self.ratios))
        return logits.log_softmax(3), state

    @torch.no_grad()
    def sample(self, x: Tensor, mask: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Actions (count, layers, 2) int64; the last ratio wherever mask, (layers, 2) bool, is false."""
        action = torch.full((count, 1, 2), self.ratios - 1)
        state, actions = None, []
        for t in range(len(x)):
            log_probs, state = self(x[t : t + 1], action, state)
            drawn = torch.multinomial(log_probs.exp().flatten(0, 2), 1, generator=generator).view(count, 1, 2)
            action = torch.where(mask[t], drawn, self.ratios - 1)
            actions.append(action)
        return torch.cat(actions, 1)

    def log_prob(self, x: Tensor, mask: Tensor, actions: Tensor) -> Tensor:
        """Log-probability of each of the action sequences (count, layers, 2), (count,)."""
        previous = torch.cat([torch.full_like(actions[:, :1], self.ratios - 1), actions[:, :-1]], 1)
        log_probs: Tensor = self(x, previous)[0]
        return (log_probs.gather(3, actions[..., None])[..., 0] * mask).sum((1, 2))
