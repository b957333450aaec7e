"""The two policies: which layers to remove, and how far to shrink those that remain (sections 3.1.1, 3.1.2).

Both see a sequence of layers x, (layers, features), and draw the actions of all rollouts of an update in one batched
pass. `sample` draws without gradients; `log_prob` scores drawn actions in one differentiable pass. Actions that change
nothing are masked: they are drawn as "keep as it is" and add nothing to the log-probability.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from n2n_fast.files.errors import BadInput, first_line
from n2n_fast.files.states import load_finite
from n2n_fast.search.config import SearchConfig
from n2n_fast.training.distill import seeded
from n2n_fast.training.seeds import derived

KEEP_PROBABILITY = 0.8  # of untrained policies, where nothing tells more
MOST_REMOVED = 0.7  # share of the layers, at severity 1
MOST_CROPPED = 0.5  # share of the kernels, at severity 1
UNEVENNESS = 0.3  # deviation of the widths, at severity 1
LIKENESS = 0.95  # with which a warm-started policy keeps a layer or a kernel as the demonstration does
NEARNESS = 0.3  # deviation of the logarithms of its widths around the demonstration's
CLONED = 0.03  # KL divergence in nats for each choice that is near enough to the demonstration
CLONING_RATE = 0.005  # Adam's
CLONING_STEPS = 500  # at most
CLONING_SAMPLES = 8  # sequences for each step
MUTATIONS = 4  # at most, of one sequence of actions


@contextlib.contextmanager
def on_one_thread() -> Iterator[None]:
    """Keep torch to one thread: policies and predictors are so small that several only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class RemovalPolicy(nn.Module):
    """π_remove(a_t | h_{t-1}, h_{t+1}, x_t): a bidirectional LSTM; action 1 keeps a layer, 0 removes it.

    keep_probability: of every layer before any training.
    """

    def __init__(
        self, features: int, hidden: int = 30, layers: int = 2, keep_probability: float = KEEP_PROBABILITY
    ) -> None:
        """Draw the initial weights from torch's global generator."""
        super().__init__()
        self.options = 2
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

    def spread(self, mask: Tensor, severity: float, generator: torch.Generator) -> Tensor:
        """Actions (layers,) of chance, not of the policy; severity: in [0, 1), how likely a removal is."""
        keep: Tensor = torch.rand(len(mask), generator=generator) >= MOST_REMOVED * severity
        return (keep | ~mask).long()

    def mutated(self, actions: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """Actions (count, layers) of which one to MUTATIONS free ones are turned."""
        return torch.where(_touched(actions, mask, generator), 1 - actions, actions)

    def around(self, actions: Tensor) -> Tensor:
        """Probability of keeping each layer, (layers,), which is high where `actions`, (layers,), do."""
        return torch.where(actions == 1, LIKENESS, 1 - LIKENESS)

    def divergence(self, x: Tensor, mask: Tensor, wanted: Tensor, generator: torch.Generator) -> Tensor:
        """KL divergence of the policy from the probabilities `wanted`, in nats, all free choices together."""
        logits = self(x)
        likelihood = wanted * nn.functional.logsigmoid(logits) + (1 - wanted) * nn.functional.logsigmoid(-logits)
        entropy = -torch.xlogy(wanted, wanted) - torch.xlogy(1 - wanted, 1 - wanted)
        total: Tensor = ((-likelihood - entropy) * mask).sum()
        return total

    def score(self, x: Tensor, mask: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of each action sequence (count, layers), and entropy of its choices, (count,) each.

        The entropy is a choice's mean share of the largest there is.
        """
        logits = self(x)
        both = torch.stack([nn.functional.logsigmoid(-logits), nn.functional.logsigmoid(logits)], 1)
        chosen: Tensor = torch.where(actions == 1, both[:, 1], both[:, 0]) * mask
        entropy = -(both.exp() * both).sum(1)[mask].mean() / math.log(self.options)
        return chosen.sum(1), entropy.expand(len(actions))

    def log_prob(self, x: Tensor, mask: Tensor, actions: Tensor) -> Tensor:
        """Log-probability of each of the action sequences (count, layers), (count,)."""
        return self.score(x, mask, actions)[0]


class ShrinkagePolicy(nn.Module):
    """π_shrink(a_t | a_{t-1}, h_{t-1}, x_t): an autoregressive LSTM that draws two ratios for each layer.

    An action is a pair of indices into the ratios, that of the channels and that of the kernel; the last ratio is 1.
    ratios: the last of them 1. keep_probability: of every kernel's size before any training; the widths'
    ratios are all about as likely.
    """

    def __init__(
        self,
        features: int,
        ratios: Sequence[float],
        hidden: int = 30,
        layers: int = 2,
        keep_probability: float = KEEP_PROBABILITY,
    ) -> None:
        """Draw the initial weights from torch's global generator."""
        super().__init__()
        self.ratios = count = len(ratios)
        self.options = max(2, count)
        self.log_ratios = [math.log(ratio) for ratio in ratios]
        self.lstm = nn.LSTM(features + 2 * count, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, 2 * count)
        with torch.no_grad():  # most ratios make a 3x3 kernel 1x1, which few layers bear
            self.head.bias[-1] = torch.logit(torch.tensor(keep_probability)) + math.log(max(1, count - 1))

    def forward(self, x: Tensor, actions: Tensor) -> Tensor:
        """Log-probability of every ratio at each step, after the `actions` before it; (count, layers, 2, ratios).

        x: (layers, features), actions: (count, layers, 2).
        """
        previous = torch.cat([torch.full_like(actions[:, :1], self.ratios - 1), actions[:, :-1]], 1)
        seen = nn.functional.one_hot(previous, self.ratios).flatten(2).to(x.dtype)
        output = self.lstm(torch.cat([x.expand(len(actions), -1, -1), seen], 2))[0]
        logits: Tensor = self.head(output)
        return logits.view(*actions.shape, self.ratios).log_softmax(3)

    @torch.no_grad()
    def sample(self, x: Tensor, mask: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Actions (count, layers, 2) int64; the last ratio wherever mask, (layers, 2) bool, is false.

        An action is the largest of its logits plus Gumbel noise. The steps are numpy's: calling a torch operator costs
        more than so few numbers do.
        """
        noise = torch.empty(len(x), count, 2, self.ratios).exponential_(generator=generator).log_().neg_().numpy()
        first, *others = (_Cell(self.lstm, k) for k in range(self.lstm.num_layers))
        of_features, of_channels, of_kernel = np.split(first.of_input, [x.shape[1], x.shape[1] + self.ratios])
        inputs = x.numpy() @ of_features
        head, bias = self.head.weight.numpy().T, self.head.bias.numpy()
        zeros = np.zeros((count, self.lstm.hidden_size), dtype=np.float32)
        states = [(zeros, zeros)] * self.lstm.num_layers
        unchanged = np.full((count, 2), self.ratios - 1)
        free, is_free = mask.numpy(), mask.any(1).tolist()
        actions = np.empty((len(x), count, 2), dtype=np.int64)
        action = unchanged
        for t in range(len(x)):
            states[0] = first(inputs[t] + of_channels[action[:, 0]] + of_kernel[action[:, 1]], states[0])
            for k, cell in enumerate(others, 1):
                states[k] = cell(states[k - 1][0] @ cell.of_input, states[k])
            action = unchanged
            if is_free[t]:
                logits = (states[-1][0] @ head + bias).reshape(count, 2, self.ratios)
                action = np.where(free[t], (logits + noise[t]).argmax(2), unchanged)
            actions[t] = action
        return torch.from_numpy(actions).transpose(0, 1)

    def spread(self, mask: Tensor, severity: float, generator: torch.Generator) -> Tensor:
        """Actions (layers, 2) of chance, not of the policy: fewer channels, and less even, as severity grows."""
        last = self.ratios - 1
        at = last - severity * last * (1 + UNEVENNESS * torch.randn(len(mask), generator=generator))
        widths = at.round().clamp(0, last).long()
        cropped = torch.rand(len(mask), generator=generator) < MOST_CROPPED * severity
        drawn = torch.stack([widths, torch.where(cropped, 0, last)], 1)
        return torch.where(mask, drawn, last)

    def mutated(self, actions: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """Actions (count, layers, 2) of which one to MUTATIONS free ones are moved.

        A width moves by one or two ratios; a kernel is cropped to a point, or is whole again.
        """
        last = self.ratios - 1
        steps = torch.tensor([-2, -1, 1, 2])[torch.randint(4, actions.shape, generator=generator)]
        widths, kernels = (actions + steps).clamp(0, last), torch.where(actions < last, last, 0)
        moved = torch.stack([widths[..., 0], kernels[..., 1]], -1)
        return torch.where(_touched(actions, mask, generator), moved, actions)

    def around(self, actions: Tensor) -> Tensor:
        """Probabilities of all ratios, (layers, 2, ratios), high near the widths of `actions` and at their kernels."""
        ratios = torch.tensor(self.log_ratios)
        apart = (ratios - ratios[actions[:, :1]]) / NEARNESS
        widths = (-0.5 * apart**2).softmax(1)
        others = (1 - LIKENESS) / max(1, self.ratios - 1)
        kernels = torch.full_like(widths, others).scatter(1, actions[:, 1:], LIKENESS)
        return torch.stack([widths, kernels / kernels.sum(1, keepdim=True)], 1)

    def divergence(self, x: Tensor, mask: Tensor, wanted: Tensor, generator: torch.Generator) -> Tensor:
        """KL divergence of the policy from the probabilities `wanted`, in nats, all free choices together.

        Each choice follows actions that are drawn from `wanted`.
        """
        flat = wanted.flatten(0, 1)
        drawn = torch.multinomial(flat, CLONING_SAMPLES, replacement=True, generator=generator)
        actions = drawn.T.reshape(CLONING_SAMPLES, len(x), 2).where(mask, self.ratios - 1)
        difference: Tensor = torch.xlogy(wanted, wanted) - wanted * self(x, actions)
        return (difference.sum(3).mean(0) * mask).sum()

    def score(self, x: Tensor, mask: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of each action sequence (count, layers, 2), and entropy of its choices, (count,) each.

        The entropy is a choice's mean share of the largest there is, each choice after the actions before it.
        """
        log_probs: Tensor = self(x, actions)
        chosen = log_probs.gather(3, actions[..., None])[..., 0] * mask
        entropy = -(log_probs.exp() * log_probs).sum(3)[:, mask].mean(1) / math.log(self.options)
        return chosen.sum((1, 2)), entropy

    def log_prob(self, x: Tensor, mask: Tensor, actions: Tensor) -> Tensor:
        """Log-probability of each of the action sequences (count, layers, 2), (count,)."""
        return self.score(x, mask, actions)[0]


def _touched(actions: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """Of each row of actions, one to MUTATIONS that the mask leaves free, by chance; bool."""
    order = torch.rand(actions.shape, generator=generator).where(mask, 2.0).flatten(1).argsort(1).argsort(1)
    counts = torch.randint(1, MUTATIONS + 1, (len(actions), 1), generator=generator)
    return (order < counts).view(actions.shape) & mask


def new_policy(
    stage: str, features: int, config: SearchConfig, trained: Mapping[str, Any]
) -> RemovalPolicy | ShrinkagePolicy:
    """A stage's policy, drawn by the seed, or as another run left it. trained: state dicts by stage; may be empty.

    Raises BadInput where such a state does not fit.
    """
    keep = config.keep_probability or KEEP_PROBABILITY
    policy: RemovalPolicy | ShrinkagePolicy
    with seeded(derived(config.seed, stage, "policy"), torch.device("cpu")):
        if stage == "removal":
            policy = RemovalPolicy(features, config.hidden, config.lstm_layers, keep)
        else:
            policy = ShrinkagePolicy(features, config.ratios, config.hidden, config.lstm_layers, keep)
    if stage in trained:
        try:
            load_finite(policy, trained[stage])
        except (RuntimeError, TypeError, AttributeError, ValueError) as error:
            raise BadInput(
                f"--policy: its policy of {stage} does not fit ({first_line(error)}); "
                "use the same ratios, hidden and lstm_layers"
            ) from None
    return policy


@on_one_thread()
def clone_behaviour(policy: RemovalPolicy | ShrinkagePolicy, x: Tensor, mask: Tensor, actions: Tensor) -> None:
    """Warm-start a policy by behaviour cloning: train it until the actions that it samples lie around these.

    x: (layers, features); mask, actions: of one student, as `log_prob` takes them for many.
    """
    free, wanted = max(1, int(mask.sum())), policy.around(actions)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(policy.parameters(), CLONING_RATE)
    for _ in range(CLONING_STEPS):
        divergence = policy.divergence(x, mask, wanted, generator) / free
        if divergence.item() <= CLONED:
            return
        optimizer.zero_grad()
        divergence.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


class _Cell:
    """One step of one layer of an LSTM, in numpy."""

    def __init__(self, lstm: nn.LSTM, layer: int) -> None:
        """of_input: the transposed weight of the input, (inputs, 4 hidden)."""
        names = (f"{kind}_l{layer}" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        of_input, of_hidden, *biases = (getattr(lstm, name).detach().numpy() for name in names)
        self.of_input, self.of_hidden = of_input.T.copy(), of_hidden.T.copy()
        self.bias = biases[0] + biases[1]

    def __call__(self, inputs: np.ndarray, state: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """inputs: times their weight, (count, 4 hidden); state: output and cell, (count, hidden) each."""
        hidden, cell = state
        size = hidden.shape[1]
        gates = inputs + hidden @ self.of_hidden + self.bias
        update = np.tanh(gates[:, 2 * size : 3 * size])
        opened = 0.5 + 0.5 * np.tanh(0.5 * gates)  # the logistic function, which cannot overflow so
        enter, forget, leave = opened[:, :size], opened[:, size : 2 * size], opened[:, 3 * size :]
        cell = forget * cell + enter * update
        return leave * np.tanh(cell), cell
