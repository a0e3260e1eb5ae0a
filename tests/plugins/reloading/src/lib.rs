//! A low-rank update in one of several variants. Which one stands in 16 bytes of the library, which a test overwrites in a
//! copy: that is a rebuild of another source, at no cost.

use homeroom_sdk::prelude::*;

static VARIANT: [u8; 32] = *b"HOMEROOM_VARIANTplain...........";

fn variant() -> String {
    // SAFETY: a reference is readable. Volatile, or the compiler would read it at build time.
    let bytes = unsafe { std::ptr::read_volatile(&VARIANT) };
    String::from_utf8_lossy(&bytes[16..]).trim_end_matches('.').to_owned()
}

/// Runs when the library is loaded.
extern "C" fn on_load() {
    if variant() == "segfault" {
        // SAFETY: none; the test is that a host outlives it.
        unsafe { std::ptr::null_mut::<u8>().add(1).write_volatile(1) }
    }
}

// SAFETY: the section holds pointers to functions that take nothing, as the system's loader calls them.
#[cfg_attr(target_os = "linux", unsafe(link_section = ".init_array"))]
#[used]
static ON_LOAD: extern "C" fn() = on_load;

struct Reloading {
    variant: String,
}

impl Strategy for Reloading {
    const NAME: &'static str = "reloading";
    const DOC: &'static str = "a low-rank update in the variant that its bytes name";

    fn options(_: &mut Options) {}

    fn new(_: &Values) -> Result<Self> {
        Ok(Self { variant: variant() })
    }

    fn plan(&self, model: &Model, plan: &mut Planner) -> Result<()> {
        match self.variant.as_str() {
            "panic_plan" => panic!("as asked"),
            "abort" => std::process::abort(),
            "exit" => std::process::exit(7),
            "devour" => {
                let taken: Vec<Vec<u8>> = (0..1024).map(|_| vec![0; 1 << 26]).collect();
                panic!("it was given {} pieces of 64 MiB", taken.len());
            }
            "spin" => loop {
                std::hint::spin_loop();
            },
            _ => {}
        }
        let r = if self.variant.starts_with("rank") { 16 } else { 8 };
        plan.scalar("s", 1.0);
        if self.variant == "faster" {
            plan.learning_rate(0.25);
        }
        let mut targets = vec!["q_proj".to_owned(), "v_proj".to_owned()];
        if self.variant == "worse" {
            targets.push("lm_head".to_owned());
        }
        for module in model.matching(&Targets::Endings(targets))? {
            let adapted = plan.adapt(module);
            adapted.param("A", [r, module.d_in], Init::Normal { std: 0.1 });
            if self.variant == "rank_migrate" {
                adapted.migrate(Migrate::PadInit);
            }
            adapted.param("B", [module.d_out, r], Init::Zeros);
            if self.variant == "rank_migrate" {
                adapted.migrate(Migrate::PadZero);
            }
            if self.variant == "more" {
                adapted.param("shift", [module.d_out], Init::Zeros);
            }
            if self.variant == "codec" {
                let code = (-127..=127).map(|level| level as f32 / 127.0).collect();
                let (name, block) = ("other".to_owned(), Block::Row);
                plan.store(module, &Codec { name, bits: 8, block, code, absmax: Absmax::F32 });
            }
        }
        Ok(())
    }

    fn forward<'t>(&self, module: &Module<'t>, x: Node<'t>) -> Node<'t> {
        if self.variant == "panic_trace" {
            panic!("in the trace, as asked");
        }
        let update = x.matmul_t(module.param("A")).matmul_t(module.param("B"));
        match self.variant.as_str() {
            "nan" => {
                let nothing = update * 0.0;
                module.base(x) + nothing / (nothing * 1.0)
            }
            "worse" if module.output_embedding => module.base(x) * 40.0 + update,
            "more" => module.base(x) + update * 2.0 + module.param("shift"),
            "quieter" => module.base(x) + update * 1.2,
            variant if variant.contains("scalar") => module.base(x) + update * module.scalar("s"),
            _ => module.base(x) + update * 2.0,
        }
    }

    fn on_step(&self, step: &mut Step) -> Result<()> {
        let count = step.state.as_u64().unwrap_or(0) + 1;
        step.state = count.into();
        match self.variant.as_str() {
            "freeze" if count == 2 => step.freeze("*.A"),
            "unfreeze" if count == 2 => step.freeze("*"),
            "unfreeze" if count == 4 => step.unfreeze("*.B"),
            "restrained" if count == 2 => {
                step.freeze("*.A");
                step.learning_rate_scale(0.5);
            }
            "no_rate" => step.learning_rate_scale(0.0),
            "set_scalar" if count == 3 => step.scalar("s", 0.0),
            "reset" if count == 3 => step.reset_moments("*"),
            "bad" => step.freeze("nothing"),
            "explodes" if count == 3 => step.learning_rate_scale(1e40),
            "no_number" => step.learning_rate_scale(f64::NAN),
            "unknown" => step.scalar("S", 0.5),
            "panics" => panic!("in on_step, as asked"),
            "error" => return Err("an error, as asked".into()),
            "late" => loop {
                std::thread::sleep(std::time::Duration::from_secs(60));
            },
            _ => {}
        }
        Ok(())
    }
}

export_strategy!(Reloading);
