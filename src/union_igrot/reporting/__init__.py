"""Reports of evaluation results: page, contact sheets, model card, sweep tables, published results."""

from typing import TYPE_CHECKING

from union_igrot._lazy import lazy_exports

if TYPE_CHECKING:
    from union_igrot.reporting.contact_sheets import SheetRow as SheetRow, contact_sheet as contact_sheet
    from union_igrot.reporting.model_card import (
        render_model_card as render_model_card,
        write_model_card as write_model_card,
    )
    from union_igrot.reporting.page import Provenance as Provenance, write_page as write_page
    from union_igrot.reporting.sweep_results import (
        published_for as published_for,
        published_results as published_results,
    )

__getattr__, __dir__ = lazy_exports(__name__, __file__)
