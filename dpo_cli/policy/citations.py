"""BibTeX of the paper behind DPO, and of the one behind each loss."""

from __future__ import annotations

from typing import NamedTuple


class Paper(NamedTuple):
    """key: BibTeX's. arxiv: the number of the preprint, which the loss's docstring cites as its source."""

    key: str
    authors: str
    title: str
    year: int
    arxiv: str

    def bibtex(self) -> str:
        return "\n".join(
            [
                f"@misc{{{self.key},",
                f"  author = {{{self.authors}}},",
                f"  title = {{{{{self.title}}}}},",
                f"  year = {{{self.year}}},",
                f"  eprint = {{{self.arxiv}}},",
                "  archivePrefix = {arXiv},",
                "}",
            ]
        )


DPO = Paper(
    "rafailov2023direct",
    "Rafailov, Rafael and Sharma, Archit and Mitchell, Eric and Ermon, Stefano and Manning, Christopher D. and Finn, "
    "Chelsea",
    "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
    2023,
    "2305.18290",
)
_APO = Paper(
    "doosterlinck2024anchored",
    "D'Oosterlinck, Karel and others",
    "Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment",
    2024,
    "2408.06266",
)
_AOT = Paper(
    "melnyk2024distributional",
    "Melnyk, Igor and others",
    "Distributional Preference Alignment of LLMs via Optimal Transport",
    2024,
    "2406.05882",
)
# By the name of the loss; losses that are DPO's own, or ours, have no further paper.
PAPERS: dict[str, Paper] = {
    "robust_dpo": Paper(
        "chowdhury2024provably",
        "Chowdhury, Sayak Ray and Kini, Anush and Natarajan, Nagarajan",
        "Provably Robust DPO: Aligning Language Models with Noisy Feedback",
        2024,
        "2403.00409",
    ),
    "ipo": Paper(
        "azar2023general",
        "Azar, Mohammad Gheshlaghi and others",
        "A General Theoretical Paradigm to Understand Learning from Human Preferences",
        2023,
        "2310.12036",
    ),
    "hinge": Paper(
        "zhao2023slichf",
        "Zhao, Yao and others",
        "SLiC-HF: Sequence Likelihood Calibration with Human Feedback",
        2023,
        "2305.10425",
    ),
    "kto": Paper(
        "ethayarajh2024kto",
        "Ethayarajh, Kawin and Xu, Winnie and Muennighoff, Niklas and Jurafsky, Dan and Kiela, Douwe",
        "KTO: Model Alignment as Prospect Theoretic Optimization",
        2024,
        "2402.01306",
    ),
    "simpo": Paper(
        "meng2024simpo",
        "Meng, Yu and Xia, Mengzhou and Chen, Danqi",
        "SimPO: Simple Preference Optimization with a Reference-Free Reward",
        2024,
        "2405.14734",
    ),
    "cpo": Paper(
        "xu2024contrastive",
        "Xu, Haoran and others",
        "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine Translation",
        2024,
        "2401.08417",
    ),
    "orpo": Paper(
        "hong2024orpo",
        "Hong, Jiwoo and Lee, Noah and Thorne, James",
        "ORPO: Monolithic Preference Optimization without Reference Model",
        2024,
        "2403.07691",
    ),
    "apo_zero": _APO,
    "apo_down": _APO,
    "nca_pair": Paper(
        "chen2024noise",
        "Chen, Huayu and others",
        "Noise Contrastive Alignment of Language Models with Explicit Rewards",
        2024,
        "2402.05369",
    ),
    "exo_pair": Paper(
        "ji2024exact",
        "Ji, Haozhe and others",
        "Towards Efficient Exact Optimization of Language Model Alignment",
        2024,
        "2402.00856",
    ),
    "sppo_hard": Paper(
        "wu2024selfplay",
        "Wu, Yue and others",
        "Self-Play Preference Optimization for Language Model Alignment",
        2024,
        "2405.00675",
    ),
    "discopop": Paper(
        "lu2024discovering",
        "Lu, Chris and others",
        "Discovering Preference Optimization Algorithms with and for Large Language Models",
        2024,
        "2406.08414",
    ),
    "sigmoid_norm": Paper(
        "lambert2024tulu3",
        "Lambert, Nathan and others",
        "Tulu 3: Pushing Frontiers in Open Language Model Post-Training",
        2024,
        "2411.15124",
    ),
    "aot": _AOT,
    "aot_unpaired": _AOT,
    "bco_pair": Paper(
        "jung2024binary",
        "Jung, Seungjae and others",
        "Binary Classifier Optimization for Large Language Model Alignment",
        2024,
        "2404.04656",
    ),
    "mix": Paper(
        "wang2024mpo",
        "Wang, Weiyun and others",
        "Enhancing the Reasoning Ability of Multimodal Large Language Models via Mixed Preference Optimization",
        2024,
        "2411.10442",
    ),
}


def bibtex(loss: str) -> str:
    """What to cite for a model that was trained with this loss: DPO, and the loss's own paper where it has one."""
    own = PAPERS.get(loss)
    return "\n\n".join(paper.bibtex() for paper in (DPO, own) if paper is not None)
