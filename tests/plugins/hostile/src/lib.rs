//! A strategy that misbehaves in the way its option says, to show that the host stays well.

use homeroom_sdk::prelude::*;

struct Hostile {
    how: String,
}

impl Strategy for Hostile {
    const NAME: &'static str = "hostile";
    const DOC: &'static str = "misbehaves in the way its option says";

    fn options(options: &mut Options) {
        // `plugins check` gives no options, so its tests say it in the environment.
        let how = std::env::var("HOSTILE").unwrap_or_else(|_| "well".to_owned());
        options.string(
            "how",
            &how,
            "panic, print, error, shape, name, cut, zero, abort, crash, exit, loop, merge, fickle",
        );
        if how == "schema" {
            options.int("Rank", 1, "");
        }
    }

    fn new(values: &Values) -> Result<Self> {
        Ok(Self { how: values.string("how")? })
    }

    fn plan(&self, model: &Model, plan: &mut Planner) -> Result<()> {
        match self.how.as_str() {
            "panic" => panic!("as asked"),
            "print" => println!("not a result"),
            "error" => return Err("an error, as asked".into()),
            "abort" => std::process::abort(),
            // SAFETY: there is none; a crash is what is asked for.
            "crash" => unsafe { std::ptr::null_mut::<u8>().write_volatile(1) },
            "exit" => std::process::exit(0),
            "loop" => loop {
                std::thread::sleep(std::time::Duration::from_millis(10));
            },
            _ => {}
        }
        for module in model.matching(&Targets::AllLinear)? {
            let first = if self.how == "fickle" { Init::Constant(f64::from(std::process::id())) } else { Init::Zeros };
            plan.adapt(module).param("shift", [module.d_out], first);
        }
        Ok(())
    }

    fn forward<'t>(&self, module: &Module<'t>, x: Node<'t>) -> Node<'t> {
        let shift = module.param(if self.how == "name" { "shfit" } else { "shift" });
        match self.how.as_str() {
            "shape" => module.base(x).matmul(shift),
            "cut" => module.base(x) + shift.detach(),
            "zero" => module.base(x) + (shift - module.param("shift")),
            _ => module.base(x) + shift,
        }
    }

    fn merged<'t>(&self, module: &Module<'t>) -> Option<Merged<'t>> {
        // The shift belongs to the bias, which this leaves as it is.
        (self.how == "merge").then(|| Merged::weight(module.weight()))
    }
}

export_strategy!(Hostile);
