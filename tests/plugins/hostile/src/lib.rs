//! A strategy that misbehaves in the way its option or the environment variable `HOSTILE` says, to show that the host stays well.

mod raw;

use homeroom_sdk::prelude::*;

/// What is asked for by the environment, which holds from the moment that the library is loaded.
fn asked() -> String {
    std::env::var("HOSTILE").unwrap_or_else(|_| "well".to_owned())
}

struct Hostile {
    how: String,
}

/// Takes memory until there is none.
fn devour() -> Vec<Vec<u8>> {
    (0..1 << 14).map(|_| vec![0; 1 << 26]).collect()
}

/// Never returns, and takes no time of the processor's.
fn sleep_on() -> ! {
    loop {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

fn recurse(depth: u64) -> u64 {
    std::hint::black_box(if depth == u64::MAX { 0 } else { 1 + recurse(depth + 1) })
}

/// Ends or holds the process in one of the ways that a mistake does.
fn misbehave(how: &str) {
    match how {
        "abort" => std::process::abort(),
        // SAFETY: there is none; a crash is what is asked for.
        "crash" => unsafe { std::ptr::null_mut::<u8>().write_volatile(1) },
        "exit" => std::process::exit(0),
        "loop" => sleep_on(),
        "devour" => drop(devour()),
        "recurse" => drop(recurse(0)),
        // A process that holds the standard streams, and that nobody waits for.
        "spawn" => {
            let time = std::env::var("HOSTILE_TIME").unwrap_or_default();
            drop(std::process::Command::new("sleep").arg(time).spawn());
        }
        _ => {}
    }
}

impl Strategy for Hostile {
    const NAME: &'static str = "hostile";
    const DOC: &'static str = "misbehaves in the way its option says";

    fn options(options: &mut Options) {
        // `plugins check` gives no options, so its tests say it in the environment.
        let how = asked();
        options.string("how", &how, "how it misbehaves, see its source");
        if how == "schema" {
            options.int("Rank", 1, "");
        }
        if how == "options" {
            for i in 0..1_000_000 {
                options.int(&format!("o{i}"), 1, "");
            }
        }
    }

    fn new(values: &Values) -> Result<Self> {
        Ok(Self { how: values.string("how")? })
    }

    fn plan(&self, model: &Model, plan: &mut Planner) -> Result<()> {
        misbehave(&self.how);
        match self.how.as_str() {
            "panic" => panic!("as asked"),
            "panic_long" => panic!("{}", "as asked ".repeat(1 << 20)),
            "panic_payload" => std::panic::panic_any(PanicsAgain),
            "escapes" => return Err("\x1b]0;owned\x07\x1b[2Jan error, as asked".into()),
            "print" => println!("not a result"),
            "print_escapes" => println!("\x1b[31mred\x1b[2J"),
            "error" => return Err("an error, as asked".into()),
            "shared" => shared(plan, 10_000_000, 1),
            "memory" => shared(plan, 1000, 1 << 30),
            "endless" => _ = plan.shared("endless", [usize::MAX, usize::MAX], Init::Zeros),
            "long_name" => _ = plan.shared(&"n".repeat(1 << 20), [1], Init::Zeros),
            "rate" => plan.learning_rate(f64::MAX),
            "infinite" => plan.scalar("s", f64::INFINITY),
            _ => {}
        }
        for module in model.matching(&Targets::AllLinear)? {
            let first = if self.how == "fickle" { Init::Constant(f64::from(std::process::id())) } else { Init::Zeros };
            let adapted = plan.adapt(module).param("shift", [module.d_out], first);
            if self.how == "params" {
                for i in 0..1_000_000 {
                    adapted.param(&i.to_string(), [1], Init::Zeros);
                }
            }
        }
        Ok(())
    }

    fn forward<'t>(&self, module: &Module<'t>, x: Node<'t>) -> Node<'t> {
        let shift = module.param(if self.how == "name" { "shfit" } else { "shift" });
        match self.how.as_str() {
            "shape" => module.base(x).matmul(shift),
            "cut" => module.base(x) + shift.detach(),
            "zero" => module.base(x) + (shift - module.param("shift")),
            "nodes" => (0..10_000_000).fold(module.base(x) + shift, |y, _| y.silu()),
            "outer" => {
                let column = module.weight().reshape(&[Dim::Fixed(module.d_in * module.d_out), Dim::Fixed(1)]);
                let square = |m: Node<'t>| m.matmul_t(m);
                module.base(x)
                    + square(square(column).reshape(&[Dim::Fixed((module.d_in * module.d_out).pow(2)), Dim::Fixed(1)]))
                        .row_norm()
            }
            _ => module.base(x) + shift,
        }
    }

    fn merged<'t>(&self, module: &Module<'t>) -> Option<Merged<'t>> {
        // The shift belongs to the bias, which this leaves as it is.
        (self.how == "merge").then(|| Merged::weight(module.weight()))
    }
}

/// Parameters of the whole model.
fn shared(plan: &mut Planner, count: usize, size: usize) {
    for number in 0..count {
        plan.shared(&number.to_string(), [size], Init::Zeros);
    }
}

/// A panic that panics when it is dropped.
struct PanicsAgain;

impl Drop for PanicsAgain {
    fn drop(&mut self) {
        panic!("and again");
    }
}
