"""Slow, obvious losses and metrics in float64: one sample, one class, one bin at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence


def softmax(logits: Sequence[float], temperature: float = 1.0) -> list[float]:
    """Probabilities of one sample."""
    top = max(logits)
    weights = [math.exp((logit - top) / temperature) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def kl(teacher: Sequence[float], student: Sequence[float], temperature: float) -> float:
    """KL of one sample from raw logits, nats."""
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    return sum(pc * (math.log(pc) - math.log(qc)) for pc, qc in zip(p, q, strict=True) if pc > 0)


def kl_gradient(
    teacher: Sequence[float], student: Sequence[float], temperature: float
) -> list[float]:
    """d KL / d student logits of one sample: (q - p) / T."""
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    return [(qc - pc) / temperature for pc, qc in zip(p, q, strict=True)]


def divergence_of(
    name: str, p: Sequence[float], q: Sequence[float], beta: float = 0.5, alpha: float = 0.1
) -> float:
    """A divergence between two lists of probabilities, outcome by outcome."""
    total = 0.0
    for pc, qc in zip(p, q, strict=True):
        if name == "kl":
            total += kl_term(pc, qc)
        elif name == "reverse-kl":
            total += kl_term(qc, pc)
        elif name == "jsd":
            m = beta * pc + (1 - beta) * qc
            total += beta * kl_term(pc, m) + (1 - beta) * kl_term(qc, m)
        elif name == "skew-kl":
            total += kl_term(pc, alpha * pc + (1 - alpha) * qc)
        else:
            total += abs(pc - qc) / 2
    return total


def kl_term(pc: float, qc: float) -> float:
    """One outcome's part of a KL: 0 log 0 is 0, and what only p allows is infinite."""
    if pc == 0:
        return 0.0
    return math.inf if qc == 0 else pc * math.log(pc / qc)


def divergence_slope(
    name: str, pc: float, qc: float, beta: float = 0.5, alpha: float = 0.1
) -> float:
    """d divergence / d q of one outcome."""
    if name == "kl":
        return -pc / qc
    if name == "reverse-kl":
        return math.log(qc / pc) + 1
    if name == "jsd":
        return (1 - beta) * math.log(qc / (beta * pc + (1 - beta) * qc))
    if name == "skew-kl":
        return -pc * (1 - alpha) / (alpha * pc + (1 - alpha) * qc)
    return math.copysign(0.5, qc - pc) if qc != pc else 0.0


def divergence_and_gradient(
    name: str,
    teacher: Sequence[float],
    student: Sequence[float],
    temperature: float,
    head: Sequence[int] | None = None,
    **parameters: float,
) -> tuple[float, list[float]]:
    """Of one position from raw logits; all outcomes, or a head and the rest added up as one.

    The gradient is of the student's logits; outcomes that it excludes (-inf) have none.
    """
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    groups = [[idx] for idx in (range(len(p)) if head is None else head)]
    if head is not None:
        groups.append([idx for idx in range(len(p)) if idx not in head])
    merged_p = [math.fsum(p[idx] for idx in group) for group in groups]
    merged_q = [math.fsum(q[idx] for idx in group) for group in groups]
    slopes = [0.0] * len(q)
    for group, pc, qc in zip(groups, merged_p, merged_q, strict=True):
        for idx in group:
            slopes[idx] = divergence_slope(name, pc, qc, **parameters) if qc else 0.0
    mean = math.fsum(qc * slope for qc, slope in zip(q, slopes, strict=True))
    gradient = [qc * (slope - mean) / temperature for qc, slope in zip(q, slopes, strict=True)]
    return divergence_of(name, merged_p, merged_q, **parameters), gradient


def cross_entropy(logits: Sequence[float], label: int, smoothing: float) -> float:
    """Cross-entropy of one sample to a one-hot target mixed with the uniform one, nats."""
    q, num_classes = softmax(logits), len(logits)
    targets = [
        (1 - smoothing) * (idx == label) + smoothing / num_classes for idx in range(num_classes)
    ]
    return -sum(target * math.log(qc) for target, qc in zip(targets, q, strict=True))


def objective(
    student: Sequence[Sequence[float]],
    teacher: Sequence[Sequence[float]],
    labels: Sequence[int | None],
    *,
    alpha: float,
    temperature: float,
    conf_power: float,
    label_smoothing: float,
    unlabeled_alpha: float,
    divergence: str = "kl",
    jsd_beta: float = 0.5,
    skew_alpha: float = 0.1,
    lm_weight: float = 0.0,
    next_token_losses: Sequence[Sequence[float]] = (),
    pooled_weight: float = 0.0,
    pooled: Sequence[tuple[Sequence[float], Sequence[float]]] = (),
) -> float:
    """Loss of a whole optimizer step; a sample whose label is None is unlabelled."""
    loss = 0.0
    for kind_is_labeled, weight in ((True, alpha), (False, unlabeled_alpha)):
        idxs = [idx for idx, label in enumerate(labels) if (label is not None) == kind_is_labeled]
        if not idxs:
            continue
        raw = [max(softmax(teacher[idx])) ** conf_power for idx in idxs]
        mean_weight = sum(raw) / len(raw)
        pairs = [(softmax(teacher[i], temperature), softmax(student[i], temperature)) for i in idxs]
        kds = [divergence_of(divergence, p, q, jsd_beta, skew_alpha) for p, q in pairs]
        weighted = [w / mean_weight * kd for w, kd in zip(raw, kds, strict=True)]
        loss += weight * temperature**2 * sum(weighted) / len(idxs)
        if kind_is_labeled:
            ces = [cross_entropy(student[idx], labels[idx] or 0, label_smoothing) for idx in idxs]
            loss += (1 - alpha) * sum(ces) / len(idxs)
    positions = [one for sample in next_token_losses for one in sample]
    if positions:
        loss += lm_weight * sum(positions) / len(positions)
    if pooled:
        distances = [1 - cosine(projected, state) for projected, state in pooled]
        loss += pooled_weight * sum(distances) / len(distances)
    return loss


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """Of the angle between two vectors."""
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def cosine_gradient(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """d cosine / d a: what of b's direction is across a, over the length of a."""
    length_a, length_b = math.sqrt(dot(a, a)), math.sqrt(dot(b, b))
    cos = cosine(a, b)
    return [(y / length_b - cos * x / length_a) / length_a for x, y in zip(a, b, strict=True)]


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    """Inner product."""
    return sum(x * y for x, y in zip(a, b, strict=True))


def expected_calibration_error(
    logits: Sequence[Sequence[float]], labels: Sequence[int], num_bins: int = 15
) -> float:
    """Bin by bin, (i/n, (i+1)/n]: share of samples times |accuracy - mean confidence|."""
    total = 0.0
    for bin_idx in range(num_bins):
        confidences, hits = [], []
        for sample, label in zip(logits, labels, strict=True):
            p = softmax(sample)
            confidence = max(p)
            if bin_idx / num_bins < confidence <= (bin_idx + 1) / num_bins:
                confidences.append(confidence)
                hits.append(p.index(confidence) == label)
        if hits:
            gap = abs(sum(hits) / len(hits) - sum(confidences) / len(confidences))
            total += gap * len(hits) / len(labels)
    return total


def macro_f1(predicted: Sequence[int], labels: Sequence[int]) -> float:
    """Mean of 2 TP / (2 TP + FP + FN) over the classes that occur."""
    pairs = list(zip(predicted, labels, strict=True))
    scores = []
    for c in sorted(set(predicted) | set(labels)):
        hits = sum(p == c and t == c for p, t in pairs)
        misses = sum((p == c) != (t == c) for p, t in pairs)
        scores.append(2 * hits / (2 * hits + misses))
    return sum(scores) / len(scores)


def sigmoid(logit: float) -> float:
    """Without overflow on either side."""
    if logit >= 0:
        return 1 / (1 + math.exp(-logit))
    return math.exp(logit) / (1 + math.exp(logit))


def log_sigmoid(logit: float) -> float:
    """Of one label's logit, nats."""
    return -math.log1p(math.exp(-logit)) if logit >= 0 else logit - math.log1p(math.exp(logit))


def binary_kl(teacher: float, student: float, temperature: float) -> float:
    """KL between the answers to one label, from raw logits, nats."""
    t, s = teacher / temperature, student / temperature
    there = sigmoid(t) * (log_sigmoid(t) - log_sigmoid(s))
    return there + sigmoid(-t) * (log_sigmoid(-t) - log_sigmoid(-s))


def binary_cross_entropy(student: float, label: float) -> float:
    """Of one label, which may be smoothed; nats."""
    return -label * log_sigmoid(student) - (1 - label) * log_sigmoid(-student)


def ranks(values: Sequence[float]) -> list[float]:
    """From 1; equal ones share the mean of theirs."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2
        for value in values
    ]


def correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Pearson's."""
    mean_one, mean_other = sum(one) / len(one), sum(other) / len(other)
    pairs = [(a - mean_one, b - mean_other) for a, b in zip(one, other, strict=True)]
    both = sum(a * b for a, b in pairs)
    return both / math.sqrt(sum(a * a for a, _ in pairs) * sum(b * b for _, b in pairs))
