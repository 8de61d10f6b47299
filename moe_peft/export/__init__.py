"""What an adapter becomes for serving. `stock_moe`: an FFN mixture as an ordinary MoE checkpoint."""

from moe_peft.export.plan import ExportPlan, plan_export
from moe_peft.export.routes import ROUTES
from moe_peft.export.stock_moe import export_moe
from moe_peft.export.targets import TARGETS


__all__ = ["ROUTES", "TARGETS", "ExportPlan", "export_moe", "plan_export"]
