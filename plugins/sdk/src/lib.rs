//! What the author of a training strategy imports.
//!
//! A strategy says which modules of a model it adapts, which parameters each gets, and how an adapted module computes.
//! The last is written as ordinary Rust over [`Node`] handles, which [`export_strategy!`] has recorded once for each
//! module: **traced, not called**. The host runs, differentiates and fuses the recording; during a training step no code
//! of the plugin runs, and no tensor is ever seen by it.
//!
//! ```
//! use homeroom_sdk::prelude::*;
//!
//! /// BitFit-like: learns a shift of every linear module's output.
//! struct Shift;
//!
//! impl Strategy for Shift {
//!     const NAME: &'static str = "shift";
//!     const DOC: &'static str = "learns a shift of every linear module's output";
//!     fn options(_: &mut Options) {}
//!     fn new(_: &Values) -> Result<Self> {
//!         Ok(Self)
//!     }
//!     fn plan(&self, model: &Model, plan: &mut Planner) -> Result<()> {
//!         for module in model.matching(&Targets::AllLinear)? {
//!             plan.adapt(module).param("shift", [module.d_out], Init::Zeros);
//!         }
//!         Ok(())
//!     }
//!     fn forward<'t>(&self, module: &Module<'t>, x: Node<'t>) -> Node<'t> {
//!         module.base(x) + module.param("shift")
//!     }
//! }
//!
//! let plan = homeroom_sdk::trace::<Shift>(&homeroom_sdk::testing::request("{}"))?;
//! assert_eq!(plan.recipes.len(), 1);
//! # Ok::<(), homeroom_sdk::Error>(())
//! ```

mod error;
mod export;
pub mod lora;
mod model;
pub mod native;
mod options;
mod planner;
mod record;
mod step;
mod strategy;
pub mod testing;

pub use error::{Error, Result};
pub use export::{descriptor, dispatch, no_extension};
pub use homeroom_abi as abi;
pub use model::{Model, Targets, pattern_value};
pub use options::{Options, Values, number};
pub use planner::{Adapted, Planner, Shared};
pub use record::{Module, Node};
pub use step::Step;
pub use strategy::{Merged, Strategy, trace};

/// Everything that a strategy's source file needs.
pub mod prelude {
    pub use crate::abi::codec::{Absmax, Block, Codec};
    pub use crate::abi::plan::{Group, Init, Migrate, ModuleInfo, ModuleKind};
    pub use crate::abi::shape::Dim;
    pub use crate::{
        Error, Merged, Model, Module, Node, Options, Planner, Result, Step, Strategy, Targets, Values, export_strategy,
        number, pattern_value,
    };
    pub use serde_json::{Value, json};
}
