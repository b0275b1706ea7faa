"""The functions of the public API."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from . import stages
from .evaluate import check_values, engine_for, evaluate, may_check_values, prepare
from .options import OptionKeywords, make_options, shows_options


@shows_options()
def dmi_loss(
    logits: Tensor,
    target: Tensor,
    *,
    sample_weight: Tensor | None = None,
    **options: Unpack[OptionKeywords],
) -> Tensor:
    r"""The L_DMI loss of a batch: minus the log of the absolute determinant of the joint matrix of labels and predictions.

    .. math:: U = \frac{1}{W} \sum_i w_i \, e_{y_i} \, \mathrm{softmax}(z_i)^T \qquad \text{loss} = -\log |\det U|

    It is robust to label noise that depends on the class alone: noise with transition matrix T multiplies det U by det T, which moves
    the loss by a constant and leaves its gradient as it is (Xu, Cao, Kong, Wang: "L_DMI: A Novel Information-theoretic
    Loss Function for Training Deep Nets Robust to Label Noise", NeurIPS 2019, arXiv:1909.03388).

    The loss cannot tell a labelling from a permuted one, so start from a model that cross entropy has warmed up. Its gradient is
    about C times that of cross entropy (sum_i w_i <p_i, V[y_i]> = C): lower the learning rate accordingly under SGD.

    Args:
        logits: (N, C) or (N, C, d1, ...), fp16, bf16, fp32 or fp64, any strides. Sums run in fp64.
        target: class indices of any integer dtype, (N,) or (N, d1, ...); or distributions over the classes, floating,
            in the shape of the logits (they get a gradient if they require one).
        sample_weight: (N,) or (N, d1, ...), floating, >= 0. Rows of weight 0 contribute nothing, whatever they hold. They get a
            gradient if they require one (learning to reweight); that of a row of weight 0 is 0 unless its values are finite. Where
            all weights are 0 there is no joint, and no gradient: begin with ones.
        ignore_index: class index whose rows contribute nothing.
        absent: what a class without weight in this batch means. ``"present"``: the determinant of the other classes'
            submatrix; ``"strict"``: the batch is singular.
        eps: added to \|det U\| before the logarithm. 0: the exact loss; 1e-3: the published form.
        normalize: False: the determinant of the weighted counts instead of their mean (a constant apart).
        cross_entropy_weight: this much of the weighted mean cross entropy is added, from the same pass.
        input: ``"probs"`` if the first argument holds probabilities, rows that sum to 1.
        group: a torch.distributed ProcessGroup, a 1-D DeviceMesh or ``"world"`` (the default group): the loss is that of all ranks'
            samples together, the same on every rank, from one all-reduce; the gradient is world_size times that of the local
            samples, so that the averaging of DDP and FSDP gives what one process would. Every rank has to call, with the same options
            and classes; local batches may be of any size, or empty.
        engine: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"composite"``; None chooses (see :func:`explain`). The environment variable
            LDMI_FAST_ENGINE forces one for the whole process. Under torch.func transforms, and for derivatives of the gradient, the
            composite engine computes, whichever is named: only there PyTorch can differentiate any number of times.

    Returns:
        A scalar tensor, fp32 (fp64 for fp64 logits). 0 if no row counts; +inf (-log eps with eps) if the joint matrix is
        singular, with a gradient of zero (that of the cross entropy term); NaN if a row that counts holds NaN or +inf, or has
        no finite logit.

    Raises:
        TypeError, ValueError: arguments that cannot work, with what was given and what is expected. On the CPU in eager mode
            also for sample weights that are negative or not finite (elsewhere the loss is NaN).
        IndexError: a label out of range, on the CPU in eager mode. Elsewhere the loss is NaN; on other devices the environment
            variable LDMI_FAST_CHECK=1 raises these, too, and waits for the device at every step to do so.
        RuntimeError: the forced engine cannot run here, and why; or another rank did not come to the all-reduce within the time limit
            of the group.

    Example:
        >>> loss = dmi_loss(model(images), noisy_labels)
        >>> loss.backward()
    """
    return evaluate(logits, target, sample_weight, make_options("dmi_loss", options))


_NOT_OF_JOINT = ("absent", "eps", "cross_entropy_weight", "group")


@shows_options(*_NOT_OF_JOINT)
def joint_matrix(
    logits: Tensor,
    target: Tensor,
    *,
    sample_weight: Tensor | None = None,
    **options: Unpack[OptionKeywords],
) -> Tensor:
    r"""The joint matrix of labels (rows) and predictions (columns), :math:`U = \frac1W \sum_i w_i e_{y_i} p_i^T`.

    Args:
        logits: as for :func:`dmi_loss`.
        target: as for :func:`dmi_loss`.
        sample_weight: as for :func:`dmi_loss`.
        options: ``ignore_index``, ``input`` and ``engine`` of :func:`dmi_loss`; ``normalize=False`` gives the weighted sums S = W U.

    Returns:
        (C, C), fp32 (fp64 for fp64 logits), differentiable. Zeros if no row counts.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as :func:`dmi_loss`.
    """
    checked = make_options("joint_matrix", options, without=_NOT_OF_JOINT)
    logits, target, sample_weight = prepare(logits, target, sample_weight, checked)
    joint = stages.joint_matrix(logits, target, sample_weight, checked, engine_for(logits, checked))
    if may_check_values(joint):  # else the sum would cost a launch
        check_values(joint.detach().sum(), target, sample_weight, logits.shape[1], checked.ignore_index)
    return joint
