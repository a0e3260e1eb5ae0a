//! LoRA, rsLoRA and DoRA over the base as it is stored.

use homeroom_sdk::lora::Lora;
use homeroom_sdk::prelude::*;

struct Plain(Lora);

impl Strategy for Plain {
    const NAME: &'static str = "lora";
    const DOC: &'static str = "low-rank adaptation (LoRA, rsLoRA, DoRA)";

    fn options(options: &mut Options) {
        Lora::options(options);
    }

    fn new(values: &Values) -> Result<Self> {
        Ok(Self(Lora::new(values)?))
    }

    fn plan(&self, model: &Model, plan: &mut Planner) -> Result<()> {
        self.0.plan(model, plan)
    }

    fn forward<'t>(&self, module: &Module<'t>, x: Node<'t>) -> Node<'t> {
        self.0.forward(module, x)
    }

    fn merged<'t>(&self, module: &Module<'t>) -> Option<Merged<'t>> {
        self.0.merged(module)
    }
}

export_strategy!(Plain);
