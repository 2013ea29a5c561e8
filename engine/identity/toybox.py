"""Judges of the drawn world: who is where, who is who, what they do, where it plays, and whether it is drawn at all.

In:  frames and reference pictures, float in [0, 1], of the judges' size.
Out: shares of pixels, embeddings, class scores. A folder holds a set of judges.
Knows nothing of models, jobs, or of what is done with a judgement (`train.toybox`). `ToyboxEvaluator` measures subjects
for an identity report.

There are two sets, `reward` and `test`, of different seed, width and training identities. Whatever selects or trains
reads `reward`; `test` is for published figures alone.

Shapes: F frames, N subjects, V pictures of each, P pictures, H x W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from engine.identity.crops import CROP, WHITE, crop_subjects, to_unit
from engine.identity.reporter import Detections

SIZE = 64  # pixels; what the judges were trained at
MOMENTS = 9  # frames of a clip that the action judge reads
LOOKS = 64  # numbers that say who a subject is
SEEN = 0.004  # a subject counts as there when it fills this share of a frame
STILL, FROZEN = "stands still", "nothing moves"  # the second is said of a clip that stops where something should happen


def _conv(into: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.GroupNorm(2, out), nn.ReLU(inplace=True))


class FrameFeatures(NamedTuple):
    """The locator's features of frames, before it is told which subjects to look for."""

    figure: Tensor  # (F, H, W), logits
    stranger: Tensor  # (F, 1, h, w), logits
    places: Tensor  # (F, 32, h * w), unit features at half size


class Locator(nn.Module):
    """Which pixels belong to which reference, and which to none.

    A U-Net whose features are compared: a pixel of the frame with all places of a reference, which is read at half its
    size, since pictures show a subject about twice as large as clips do. One head says whether a pixel is a drawn
    figure at all; a stranger is a figure that no reference shows.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        w, thin = width, width // 2  # full size is where the work is
        self.down = nn.ModuleList(
            [_conv(3, thin), _conv(thin, 2 * w, 2), _conv(2 * w, 4 * w, 2), _conv(4 * w, 4 * w, 2)]
        )
        self.middle = _conv(4 * w, 4 * w)
        self.up = nn.ModuleList([_conv(8 * w, 4 * w), _conv(6 * w, 2 * w), _conv(2 * w + thin, thin)])
        self.figure = nn.Conv2d(thin, 1, 1)
        self.key = nn.Conv2d(2 * w, 32, 1)
        self.stranger = nn.Conv2d(2 * w, 1, 1)
        self.sharpness = nn.Parameter(torch.tensor(2.3))

    def features(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """(P, 3, H, W) -> features at half size (P, 2w, H / 2, W / 2) and at full size (P, w / 2, H, W)."""
        seen = [pictures * 2 - 1]
        for layer in self.down:
            seen.append(layer(seen[-1]))
        x = self.middle(seen[-1])
        halves = []
        for layer, skip in zip(self.up, reversed(seen[1:-1]), strict=True):
            x = layer(torch.cat([functional.interpolate(x, scale_factor=2.0, mode="nearest"), skip], 1))
            halves.append(x)
        return halves[1], halves[2]

    def reference_keys(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """(N, V, 3, H, W) -> unit keys (N, V * h * w, 32) and how much each place counts, (N, V * h * w)."""
        N, V = pictures.shape[:2]
        small = functional.avg_pool2d(pictures.flatten(0, 1), 2)
        keys = functional.normalize(self.key(self.features(small)[0]), dim=1)
        drawn = functional.max_pool2d((small.amin(1, keepdim=True) < WHITE).float(), 2)
        share = drawn.flatten(1) / drawn.flatten(1).sum(1, keepdim=True).clamp(min=1)
        joined = keys.flatten(2).transpose(1, 2).unflatten(0, (N, V)).flatten(1, 2)
        return joined, (share.unflatten(0, (N, V)).flatten(1) / V).clamp(min=1e-6)

    def look(self, frames: Tensor) -> FrameFeatures:
        """(F, 3, H, W) -> the features of the frames, which do not depend on the subjects."""
        half, full = self.features(frames)
        places = functional.normalize(self.key(half), dim=1).flatten(2)
        return FrameFeatures(self.figure(full).squeeze(1), self.stranger(half), places)

    def match(self, looked: FrameFeatures, pictures: Tensor) -> Tensor:
        """Logits at half size (F, N + 1, h, w) of who each place is, 0 a stranger.

        (N, V, 3, H, W); with (F, N, V, 3, H, W) every frame has references of its own.
        """
        keys, share = self.reference_keys(pictures.reshape(-1, *pictures.shape[-4:]))
        if pictures.ndim == 6:
            keys, share = (each.unflatten(0, pictures.shape[:2]) for each in (keys, share))
        else:
            keys, share = keys.unsqueeze(0), share.unsqueeze(0)
        places = looked.places.unsqueeze(1) * self.sharpness.exp()
        alike = (keys @ places).exp()  # (F, N, V * h * w, h * w)
        match = (share.unsqueeze(-2) @ alike).squeeze(-2).log()
        return torch.cat([looked.stranger, match.unflatten(2, looked.stranger.shape[2:])], 1)

    def scores(self, frames: Tensor, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Figure logits (F, H, W), and what `match` gives; for teaching."""
        looked = self.look(frames)
        return looked.figure, self.match(looked, pictures)

    @torch.no_grad()
    def forward(self, looked: FrameFeatures, pictures: Tensor) -> Tensor:
        """Pictures (N, V, 3, H, W) -> shares (F, N + 1, H, W) that add up to 1; 0: nobody of them."""
        return self.shares(looked, self.match(looked, pictures))

    def shares(self, looked: FrameFeatures, scores: Tensor) -> Tensor:
        """What `match` gives -> shares (F, N + 1, H, W) that add up to 1; 0: nobody of them."""
        who = functional.interpolate(scores, scale_factor=2.0, mode="bilinear", align_corners=False).softmax(1)
        mine = looked.figure.sigmoid().unsqueeze(1) * who[:, 1:]
        return torch.cat([1 - mine.sum(1, keepdim=True), mine], 1)


class Embedder(nn.Module):
    """A cut-out subject -> a unit vector that says who it is and of which kind.

    The inner product of two such vectors is the mean of the cosine of their looks and of how far their kinds agree
    (Bhattacharyya's coefficient, 0 to 1): a subject's colours without its shape are of no kind, and can reach half.

    Columns are pooled, since subjects face either way; rows are kept, since what is on top stays there.

    Args:
        width: channels of the first layer.
        kinds: how many there are; one more answer stands for "none of them".
    """

    def __init__(self, width: int, kinds: int) -> None:
        super().__init__()
        w, rows = width, CROP // 8
        self.body = nn.Sequential(
            _conv(3, w),
            _conv(w, 2 * w, 2),
            _conv(2 * w, 2 * w),
            _conv(2 * w, 4 * w, 2),
            _conv(4 * w, 4 * w),
            _conv(4 * w, 8 * w, 2),
            _conv(8 * w, 8 * w),
        )
        self.looks = nn.Linear(2 * rows * 8 * w, LOOKS)
        # Takes out what all have in common; without it they fall together in the first updates and stay so.
        self.centre = nn.BatchNorm1d(LOOKS, affine=False, momentum=0.02)
        self.kind = nn.Linear(2 * rows * 8 * w, kinds + 1)

    def describe(self, cuts: Tensor) -> tuple[Tensor, Tensor]:
        """(P, 3, CROP, CROP) -> looks (P, LOOKS), each of length 1, and scores of kinds (P, kinds + 1)."""
        seen = self.body(cuts * 2 - 1)
        pooled = torch.cat([seen.mean(3), seen.amax(3)], 1).flatten(1)
        return functional.normalize(self.centre(self.looks(pooled).float()), dim=1), self.kind(pooled).float()

    def join(self, looks: Tensor, kinds: Tensor) -> Tensor:
        """What `describe` gives -> (P, LOOKS + kinds + 1), each of length 1."""
        roots = (kinds.log_softmax(1) / 2).exp()  # of shares; the root of a share that is 0 has no slope
        return torch.cat([looks, roots], 1) / 2**0.5

    def forward(self, cuts: Tensor) -> Tensor:
        """(P, 3, CROP, CROP) -> (P, LOOKS + kinds + 1), each of length 1."""
        return self.join(*self.describe(cuts))


class ActionJudge(nn.Module):
    """What one subject does, or one with another, and in which direction."""

    def __init__(self, width: int, verbs: int, directions: int) -> None:
        super().__init__()
        w = width
        self.look = nn.Sequential(_conv(5, w, 2), _conv(w, 2 * w, 2), _conv(2 * w, 4 * w, 2), nn.Flatten(1))
        self.join = nn.Linear(64 * w + 2 * len(_GEOMETRY), 96)
        self.time = nn.ModuleList([nn.Conv1d(96, 96, 3, padding=1) for _ in range(3)])
        self.verb = nn.Linear(2 * 96, verbs)
        self.direction = nn.Linear(2 * 96, directions)

    def forward(self, frames: Tensor, actor: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """(B, MOMENTS, 3, H, W) and masks (B, MOMENTS, H, W) of who acts and of whom it is done to (zeros: nobody).

        Returns:
            Scores of verbs (B, verbs) and of directions (B, directions).
        """
        B, T = frames.shape[:2]
        masks = torch.stack([actor, other], 2)
        both = torch.cat([frames * 2 - 1, masks], 2).flatten(0, 1)
        seen = self.look(functional.avg_pool2d(both, 2))
        x = torch.relu(self.join(torch.cat([seen, geometry(masks.flatten(0, 1))], 1))).unflatten(0, (B, T))
        x = x.transpose(1, 2)
        for layer in self.time:
            x = x + torch.relu(layer(x))
        pooled = torch.cat([x.mean(2), x.amax(2)], 1)
        return self.verb(pooled), self.direction(pooled)


_GEOMETRY = ("area", "y", "x", "spread down", "spread across", "slant", "there")


def geometry(masks: Tensor) -> Tensor:
    """(P, 2, H, W) -> (P, 14): area, centre, spread and slant of each mask, as shares of the frame."""
    H, W = masks.shape[-2:]
    ys, xs = ((torch.arange(side, device=masks.device) + 0.5) / side - 0.5 for side in (H, W))
    total = masks.sum((2, 3))
    there = (total > 0).float()
    weight = masks / total.clamp(min=1e-6)[..., None, None]
    y, x = (weight.sum(3) * ys).sum(2), (weight.sum(2) * xs).sum(2)
    dy, dx = ys - y.unsqueeze(-1), xs - x.unsqueeze(-1)
    down = ((weight.sum(3) * dy.square()).sum(2)).sqrt()
    across = ((weight.sum(2) * dx.square()).sum(2)).sqrt()
    slant = torch.einsum("pnhw,pnh,pnw->pn", weight, dy, dx)
    area = (total / (H * W)).sqrt()
    return torch.cat([area, y * there, x * there, down * 4, across * 4, slant * 30, there], 1)


class PictureJudge(nn.Module):
    """A whole frame -> class scores: where it plays, or whether it was drawn."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        w = width
        self.body = nn.Sequential(_conv(3, w, 2), _conv(w, 2 * w, 2), _conv(2 * w, 4 * w, 2), _conv(4 * w, 4 * w))
        self.head = nn.Linear(8 * w, classes)

    def forward(self, frames: Tensor) -> Tensor:
        """(P, 3, H, W) -> (P, classes)."""
        seen = self.body(frames * 2 - 1)
        return self.head(torch.cat([seen.mean((2, 3)), seen.amax((2, 3))], 1))


class Judges(nn.Module):
    """One set of judges.

    Args:
        name: "reward" or "test".
        width: of the networks' first layers.
        verbs, directions, places, kinds: the names their scores stand for, in order.
        knots: (cosine, likeness) pairs, rising, between which likeness is interpolated; empty: it is the cosine.
        critic: whether it has one; a set gets it after there is a model whose clips it can be taught on.
    """

    def __init__(
        self,
        name: str,
        width: int,
        verbs: list[str],
        directions: list[str],
        places: list[str],
        kinds: list[str],
        knots: Sequence[Sequence[float]] = (),
        critic: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.width = name, width
        self.verbs, self.directions, self.places, self.kinds = verbs, directions, places, kinds
        self.knots = [(float(cosine), float(likeness)) for cosine, likeness in knots]
        self.locator = Locator(width)
        self.embedder = Embedder(width, len(kinds))
        self.action = ActionJudge(width // 2, len(verbs), len(directions))
        self.place = PictureJudge(width // 2, len(places))
        self.critic = PictureJudge(width // 2, 1) if critic else None

    def likeness(self, cosine: Tensor) -> Tensor:
        """Cosines of two embeddings on the scale of likenesses, -1 to 1; the order stays.

        Two sets give other cosines to the same pair. The knots are fitted so that drawn clips stand near .95, and
        subjects that have lost their shape below .4, by either; a set without knots gives the cosines.
        """
        if not self.knots:
            return cosine
        at, value = (cosine.new_tensor(each) for each in zip((-1.0, -1.0), *self.knots, (1.0, 1.0), strict=True))
        place = torch.searchsorted(at, cosine.contiguous(), right=True).clamp(1, len(at) - 1)
        share = (cosine - at[place - 1]) / (at[place] - at[place - 1])
        return value[place - 1] + share.clamp(0, 1) * (value[place] - value[place - 1])

    def drawn_probability(self, frames: Tensor) -> Tensor:
        """(P, 3, H, W) -> how sure the critic is that each frame was drawn and not generated, (P,) from 0 to 1.

        Raises:
            ValueError: this set has no critic.
        """
        if self.critic is None:
            raise ValueError(f"the {self.name} judges have no critic")
        return self.critic(frames).squeeze(1).sigmoid()

    def verb_shares(self, scores: Tensor) -> Tensor:
        """The action judge's scores of verbs (B, verbs) as shares; whoever should stand still may not move at all."""
        shares = scores.softmax(-1)
        if STILL in self.verbs and FROZEN in self.verbs:
            shares = shares.clone()
            shares[:, self.verbs.index(STILL)] += shares[:, self.verbs.index(FROZEN)]
        return shares

    def save(self, folder: Path) -> None:
        """Write the set into a folder: config.json and model.safetensors, half precision."""
        names = {"verbs": self.verbs, "directions": self.directions, "places": self.places, "kinds": self.kinds}
        about: dict[str, Any] = {"name": self.name, "width": self.width, **names, "critic": self.critic is not None}
        if self.knots:
            about["knots"] = self.knots
        tensors = self.state_dict()
        for key, tensor in tensors.items():
            if tensor.is_floating_point():
                tensors[key] = tensor.detach().half().contiguous()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        save_file(tensors, folder / "model.safetensors")

    @classmethod
    def load(cls, folder: Path) -> Judges:
        """Read a set, in fp32, for judging.

        Raises:
            ValueError: its config is of another kind of set.
        """
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        try:
            judges = cls(**about)
        except TypeError as error:
            raise ValueError(f"config.json is not of these judges: {error}") from error
        judges.load_state_dict(load_file(folder / "model.safetensors"))
        return judges.eval().requires_grad_(False)


# --- who is where ----------------------------------------------------------------------------------------------------


class ToyboxEvaluator:
    """The evaluator for drawings (`engine.identity.reporter.Evaluator`).

    Args:
        judges: the networks it uses.
        pictures: of each subject, uint8 (H, W, 3).
    """

    def __init__(self, judges: Judges, pictures: Sequence[Sequence[NDArray[np.uint8]]]) -> None:
        self.title = f"toybox {judges.name}"
        self._judges = judges
        self._pictures = [_resize_pictures(own) for own in pictures]
        self._known = [judges.embedder(crop_subjects(own)) for own in self._pictures]

    @torch.no_grad()
    def look(self, frames: NDArray[np.uint8]) -> list[Detections]:
        """(F, H, W, 3) -> where the locator finds each subject, and whom each of those regions looks like."""
        units = to_unit(torch.from_numpy(frames))
        instance_ids = locate(self._judges, units, self._pictures).argmax(1)
        sights = []
        for frame, held in zip(units, instance_ids, strict=True):
            masks = torch.stack([held == slot for slot in range(1, len(self._known) + 1)])
            masks = masks[masks.float().mean((1, 2)) >= SEEN]
            similarity = compute_likenesses(
                self._judges, frame.expand(len(masks), -1, -1, -1), masks.float(), self._known
            )
            sights.append(Detections(masks.numpy(), similarity.numpy()))
        return sights


def _resize_pictures(pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
    """One subject's pictures at the judges' size, (V, 3, SIZE, SIZE) in [0, 1]."""
    whole = to_unit(torch.from_numpy(np.stack(pictures)))
    return functional.interpolate(whole, (SIZE, SIZE), mode="bilinear", antialias=True).clamp(0, 1)


def locate(judges: Judges, frames: Tensor, pictures: Sequence[Tensor]) -> Tensor:
    """Who is where: (F, 3, H, W) in [0, 1] and each subject's (V, 3, SIZE, SIZE) -> shares (F, N + 1, H, W)."""
    finder = Finder(judges, frames)
    return finder.shares([finder.match(own) for own in pictures])


class Finder:
    """Finds several casts in the same frames: frames are read once, and each subject is matched once.

    Frames of another size are resized to the height the judges were trained at, and the shares are resized back.

    Args:
        judges: whose locator it uses.
        frames: (F, 3, H, W) in [0, 1].
    """

    @torch.no_grad()
    def __init__(self, judges: Judges, frames: Tensor) -> None:
        self._locator, self._size = judges.locator, frames.shape[-2:]
        H, W = self._size
        wide = max(8, round(W * SIZE / H / 8) * 8)
        small = functional.interpolate(frames, (SIZE, wide), mode="bilinear", antialias=True)
        self._looked = self._locator.look(small)

    @torch.no_grad()
    def match(self, pictures: Tensor) -> Tensor:
        """One subject's pictures (V, 3, SIZE, SIZE) -> logits (F, h, w) that a place shows it, whatever the cast."""
        return self._locator.match(self._looked, pictures.unsqueeze(0))[:, 1]

    @torch.no_grad()
    def shares(self, matches: Sequence[Tensor]) -> Tensor:
        """What `match` gave for each subject of a cast -> shares (F, N + 1, H, W) that add up to 1; 0: nobody."""
        scores = torch.cat([self._looked.stranger, torch.stack(list(matches), 1)], 1)
        found = self._locator.shares(self._looked, scores)
        return functional.interpolate(found, self._size, mode="bilinear", align_corners=False)


def compute_likenesses(judges: Judges, frames: Tensor, masks: Tensor, known: Sequence[Tensor]) -> Tensor:
    """Likeness of every cut-out to each subject's most similar picture: (P, 3, H, W), (P, H, W) -> (P, N)."""
    if len(masks) == 0:
        return frames.new_zeros(0, len(known))
    seen = judges.embedder(crop_subjects(frames, masks))
    return judges.likeness(torch.stack([(seen @ own.T).amax(1) for own in known], 1))
