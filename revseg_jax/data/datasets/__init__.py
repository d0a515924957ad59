"""The datasets that `revseg prepare` reads: one module a layout, each with `SPLITS`, `meta_file` and `read`."""

from revseg_jax.data.datasets import lv_vis, mevis, reason_seg, reason_vos, ref_davis17, ref_youtube_vos, revos

DATASETS = {
    "ref_youtube_vos": ref_youtube_vos,
    "ref_davis17": ref_davis17,
    "mevis": mevis,
    "revos": revos,
    "lv_vis": lv_vis,
    "reason_vos": reason_vos,
    "reason_seg": reason_seg,
}

__all__ = ["DATASETS"]
