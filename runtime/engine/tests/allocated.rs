//! Holds the estimator to what training allocates, and reports on rows to how little: an allocator counts. The highest count of two steps
//! is compared with the parts that are allocated. What the allocator keeps besides, and mapped files, are no part of this.

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Result;
use homeroom_abi::plan::{AdaptedModule, Init, ModuleKind, ParamSpec, Plan, Recipes};
use homeroom_abi::recipe::{Node, Op, Recipe};
use homeroom_engine::adapt::adaptation::Adaptation;
use homeroom_engine::data::report::{Files, Survey};
use homeroom_engine::data::{Example, Reading, Source, Unit};
use homeroom_engine::estimate::{Request, Sketch, estimate};
use homeroom_engine::models::BaseModel;
use homeroom_engine::run::batch::{Batch, pass_rows};
use homeroom_engine::run::compute::Compute;
use homeroom_engine::train::{Run, TrainConfig};

/// The system's allocator, counted.
struct Counted;

static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);
/// One measurement at a time.
static MEASURING: Mutex<()> = Mutex::new(());

// SAFETY: every call is passed on as it is; counting touches no memory of the caller.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        MOST.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller holds what `alloc` asks for, and it is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller holds what `dealloc` asks for, and it is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let now = NOW.fetch_add(size, Ordering::Relaxed) + size;
        MOST.fetch_max(now - layout.size(), Ordering::Relaxed);
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller holds what `realloc` asks for, and it is passed on.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counted = Counted;

fn plan(model: &BaseModel, full: bool) -> Plan {
    let recipe = |ops: &[Op]| Recipes {
        forward: Recipe { nodes: ops.iter().map(|op| Node { op: op.clone(), at: None }).collect() },
        merged_weight: None,
        merged_bias: None,
    };
    let param = |name: &str| Op::Param(name.to_owned());
    let lora = [
        Op::X,
        Op::Base(0),
        param("A"),
        Op::MatmulT(0, 2),
        param("B"),
        Op::MatmulT(3, 4),
        Op::Scale(5, 2.0),
        Op::Add(1, 6),
    ];
    let whole = |op: Op| recipe(&[Op::X, param("weight"), op]);
    let recipes = vec![recipe(&lora), whole(Op::MatmulT(0, 1)), whole(Op::Matmul(0, 1)), whole(Op::Mul(0, 1))];
    let modules = model.modules.iter().map(|module| &module.info);
    let modules = modules.filter(|info| full || info.kind == ModuleKind::Linear && !info.output_embedding);
    let adapted = modules.map(|info| {
        let spec = |name: &str, shape: Vec<usize>, init: Init| ParamSpec {
            name: name.to_owned(),
            shape,
            init,
            trainable: true,
            tensor: format!("{}.{name}", info.path),
            tensor_shape: None,
            group: None,
            migrate: None,
        };
        let normal = Init::Normal { std: 0.02 };
        let (recipe, params) = match (full, info.kind) {
            (false, _) => (0, vec![spec("A", vec![8, info.d_in], normal), spec("B", vec![info.d_out, 8], normal)]),
            (true, kind) => {
                let recipe = match kind {
                    ModuleKind::Linear => 1,
                    ModuleKind::Embedding => 2,
                    ModuleKind::Norm => 3,
                };
                (recipe, vec![spec("weight", info.weight_shape(), Init::Base)])
            }
        };
        AdaptedModule { path: info.path.clone(), recipe, params }
    });
    Plan { modules: adapted.collect(), recipes, ..Plan::default() }
}

/// The highest count of bytes that two steps come to, and what was estimated.
fn both(
    full: bool,
    compute: Compute,
    (batch_size, row_tokens): (usize, usize),
    gradient_checkpointing: bool,
) -> Result<(usize, usize)> {
    let _alone = MEASURING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../pocket/model");
    let model = BaseModel::load(&path)?;
    let plan = plan(&model, full);
    let request = Request {
        batch_size,
        gradient_accumulation_steps: 1,
        row_tokens,
        trained_tokens: row_tokens,
        gradient_checkpointing,
        pass_rows: None,
        packing: true,
        compute,
        program_bytes: 0,
    };
    let found = estimate(&Sketch::of_model(&model), &plan, &request);
    let before = NOW.load(Ordering::Relaxed);
    let config = TrainConfig { batch_size, gradient_checkpointing, compute, ..TrainConfig::default() };
    let adaptation = Adaptation::new(&model, plan.clone(), 1)?;
    let mut run = Run::new(&model, &adaptation, &config, 2);
    let ids: Vec<u32> = (0..row_tokens as u32).map(|id| id * 7 % 256).collect();
    let examples: Vec<Example> =
        (0..batch_size).map(|_| Example::new(ids.clone(), vec![true; row_tokens], 0)).collect();
    let units: Vec<Unit> = (0..).zip(&examples).map(|(number, example)| Unit::of(number, example)).collect();
    let batches = Batch::packed(&units, pass_rows(&model));
    MOST.store(0, Ordering::Relaxed);
    for _ in 0..2 {
        run.step(&batches)?;
    }
    // What threads keep they have from an earlier run.
    let estimated = found.parts.total() - found.parts.weights - found.parts.scratch - found.parts.allocator;
    Ok((MOST.load(Ordering::Relaxed) - before, estimated as usize))
}

/// How far an estimate may be off. Fused blocks are counted to the buffer; plain ones come to a tenth more than is counted where layers are
/// as small as these, for reasons that are not known.
const BOUND: f64 = 0.12;

#[test]
fn what_is_allocated_was_estimated() -> Result<()> {
    both(false, Compute::F32, (8, 150), false)?;
    both(false, Compute::Bf16, (8, 150), false)?;
    let mut problems = Vec::new();
    for full in [false, true] {
        for compute in [Compute::F32, Compute::Bf16, Compute::Plain] {
            for (rows, recompute) in [((8, 60), false), ((3, 150), false), ((4, 100), true)] {
                let (allocated, estimated) = both(full, compute, rows, recompute)?;
                let ratio = estimated as f64 / allocated as f64;
                println!(
                    "full {full} {compute:?} {rows:?} {recompute}: allocated {allocated}, estimated {estimated}, {ratio:.3}"
                );
                if (ratio - 1.0).abs() > BOUND {
                    problems.push(format!("full {full} {compute:?} {rows:?} {recompute}: {ratio:.3}"));
                }
            }
        }
    }
    assert!(problems.is_empty(), "{problems:#?}");
    Ok(())
}

/// The highest count of bytes while so many rows, no two of them alike, are gone through for a report.
fn reported(rows: usize) -> Result<usize> {
    let file = tempfile::NamedTempFile::new()?;
    let mut lines = BufWriter::new(file.as_file());
    // Letters: many digits may be a telephone number.
    let word = |number: usize| -> String {
        format!("{number:o}").bytes().map(|digit| char::from(digit - b'0' + b'a')).collect()
    };
    for row in 0..rows {
        let [a, b, c, row] = [7, 11, 13, 1].map(|factor| word(row * factor % rows));
        writeln!(lines, "{{\"prompt\": \"{a} {b} {c} {row}\", \"completion\": \"{c} {b} {a}\"}}")?;
    }
    lines.flush()?;
    let (files, reading) = ([Source::file(file.path())], Reading::default());
    let survey =
        Survey { encoder: None, context: usize::MAX, hold_out: None, shown: 0, named: usize::MAX, check: &|| Ok(()) };
    let before = NOW.load(Ordering::Relaxed);
    MOST.store(before, Ordering::Relaxed);
    let (report, _) = survey.run(&Files::new(&files, &[], &reading))?;
    assert_eq!((report.rows, report.findings.len()), (rows, 0), "{:?}", report.findings.first());
    Ok(MOST.load(Ordering::Relaxed) - before)
}

/// A row's line and part, and while copies are looked for a band with its row and whether it is to be compared; half of that again, as
/// lists grow. Hashes are spilled.
const ROW_BYTES: usize = 24;

#[test]
fn a_report_keeps_few_bytes_of_a_row() -> Result<()> {
    let _alone = MEASURING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    // Both are many enough that hashes are spilled, and fill lists that double alike.
    let (some, twice) = (1 << 18, 1 << 19);
    let (less, more) = (reported(some)?, reported(twice)?);
    println!("{some} rows: {less} bytes, {twice}: {more}");
    assert!(more.saturating_sub(less) <= ROW_BYTES * (twice - some), "{less} bytes, of twice as many rows {more}");
    Ok(())
}
