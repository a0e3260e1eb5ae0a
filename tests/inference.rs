//! Answers: what reads prompts and draws tokens is held to the plain blocks, and no answer sees what is answered beside it.

use std::sync::Arc;

use anyhow::{Context, Result};
use homeroom_engine::adapt::adaptation::Adaptation;
use homeroom_engine::adapt::requantize::{StoredAs, store_as};
use homeroom_engine::inference::generate::{Sampling, generate};
use homeroom_engine::inference::{Adapter, Engine, Inference};
use homeroom_engine::models::BaseModel;
use homeroom_engine::run::compute::Compute;
use homeroom_engine::run::plain::decoder::KvCache as PlainKvCache;
use homeroom_engine::run::plain::recipe::Pass;
use homeroom_engine::run::waist::KvCache;
use homeroom_kernels::{Codec, Feature, Isa, with_isa};
use serde_json::{Value, json};

use crate::support::{adapt, model, shake};

/// Models whose layers differ from Llama's in some way, and one of them with quantised weights.
const FAMILIES: [&str; 12] = [
    "mistral-window",
    "qwen3",
    "qwen3-yarn",
    "gemma2",
    "gemma3",
    "smollm3",
    "phi3",
    "phi3/model-mixed.gguf",
    "phi4-mini",
    "granite",
    "granite4",
    "olmo2",
];

/// Models of every kind of layer, and bases through codecs and in other float types.
fn cases() -> Result<Vec<(String, Arc<BaseModel>)>> {
    let mut cases = Vec::new();
    for name in ["llama", "llama-tied", "llama3-rope", "mistral", "qwen2", "llama-gguf/model-mixed.gguf"] {
        cases.push((name.to_owned(), Arc::new(model(name)?)));
    }
    for name in FAMILIES {
        cases.push((name.to_owned(), Arc::new(model(name)?)));
    }
    for codec in [Codec::nf4(), Codec::int8()] {
        let name = format!("llama as {}", codec.name);
        cases.push((name, Arc::new(store_as(&model("llama")?, &StoredAs::Codec(codec), None, |_, _| {})?)));
    }
    cases.push(("llama as bf16".to_owned(), Arc::new(store_as(&model("llama")?, &StoredAs::Bf16, None, |_, _| {})?)));
    Ok(cases)
}

/// None, and low-rank updates of every module that may have one, also with learned lengths of rows.
fn adaptations(model: &BaseModel) -> Result<Vec<Option<Arc<Adaptation>>>> {
    let made = |options: Value| -> Result<Option<Arc<Adaptation>>> {
        Ok(Some(Arc::new(shake(adapt("lora", &options, model, 3)?)?)))
    };
    let some = |path: &str| model.module_index(&format!("model.layers.0.{path}")).is_some();
    // Some of the modules that a layer has apart, or in one.
    let (targets, wide) = match (some("self_attn.qkv_proj"), some("shared_mlp.input_linear")) {
        (true, _) => (json!(["qkv_proj", "down_proj"]), "qkv_proj"),
        (_, true) => (json!(["q_proj", "v_proj", "input_linear"]), "v_proj"),
        _ => (json!(["q_proj", "v_proj", "up_proj"]), "v_proj"),
    };
    let patterns = json!({"r": 4, "target_modules": targets, "rank_pattern": {wide: 19}});
    let dora = json!({"r": 3, "lora_alpha": 4, "use_dora": true});
    // In answers nothing is dropped out.
    let dropped = json!({"r": 3, "lora_alpha": 9, "use_dora": true, "lora_dropout": 0.1});
    Ok(vec![None, made(json!({"r": 3, "lora_alpha": 5}))?, made(patterns)?, made(dora)?, made(dropped)?])
}

fn ids(model: &BaseModel, count: usize, seed: u32) -> Vec<u32> {
    let vocab = model.architecture.vocab_size as u32;
    (0..count as u32).map(|i| (3 + (i + seed) * (7 + seed)) % vocab).collect()
}

/// Largest difference, as a share of the largest value.
fn apart(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let largest = b.iter().fold(0f32, |most, x| most.max(x.abs()));
    a.iter().zip(b).fold(0f32, |most, (x, y)| most.max((x - y).abs())) / largest
}

/// A base ready to answer, and an adapter on it.
type Ready = (Inference, Option<Arc<Adapter>>);

fn made_ready(model: &Arc<BaseModel>, adaptation: Option<Arc<Adaptation>>, compute: Compute) -> Result<Ready> {
    let inference = Inference::new(model.clone(), compute);
    let adapter = adaptation.map(|adaptation| Adapter::new(&inference, model.clone(), adaptation)).transpose()?;
    Ok((inference, adapter))
}

/// Reads a prompt in pieces, then tokens one at a time: the logits after the prompt and after each token.
fn logits((inference, adapter): &Ready, prompt: &[u32], pieces: usize, tokens: &[u32]) -> Result<Vec<Vec<f32>>> {
    let adapter = adapter.as_deref();
    let mut cache = inference.begin(adapter);
    let mut all = Vec::new();
    for piece in prompt.chunks(pieces) {
        let last = cache.positions() + piece.len() == prompt.len();
        all.extend(inference.read(adapter, piece, &mut *cache, prompt.len(), last)?);
    }
    for token in tokens {
        all.extend(inference.step(adapter, &mut [(*token, &mut *cache)])?);
    }
    Ok(all)
}

#[test]
fn prompts_and_tokens_have_the_logits_of_plain_blocks() -> Result<()> {
    for (name, model) in cases()? {
        let length = 97.min(model.architecture.max_position_embeddings - 8);
        let (prompt, tokens) = (ids(&model, length, 1), ids(&model, 8, 5));
        for (number, adaptation) in adaptations(&model)?.into_iter().enumerate() {
            let pass = Pass::evaluation(&model, adaptation.as_deref());
            let mut cache = PlainKvCache::default();
            let mut plain = vec![pass.continue_sequence(&prompt, &mut cache, prompt.len())?.to_vec1::<f32>()?];
            for token in &tokens {
                // A rope stays what it was when the prompt was read.
                plain.push(pass.continue_sequence(&[*token], &mut cache, prompt.len())?.to_vec1()?);
            }
            // bf16 keeps 8 bits of a number; these models are random, so that nothing hides what that adds up to.
            for (compute, bound) in [(Compute::F32, 2e-5), (Compute::Bf16, 0.1)] {
                let ready = made_ready(&model, adaptation.clone(), compute)?;
                let plain_cache = ready.0.begin(ready.1.as_deref()).prefix(0).is_none();
                assert!(!plain_cache, "adapter {number} on {name} is not run plain");
                let fast = logits(&ready, &prompt, prompt.len(), &tokens)?;
                for (position, (fast, plain)) in fast.iter().zip(&plain).enumerate() {
                    let apart = apart(fast, plain);
                    assert!(apart < bound, "adapter {number} on {name}, {compute:?}: {apart:e} apart at {position}");
                }
                for isa in Isa::tested().into_iter().filter(|isa| !isa.has(Feature::Avx512)) {
                    let other = with_isa(isa, || logits(&ready, &prompt, prompt.len(), &tokens))?;
                    let apart = other.iter().zip(&plain).map(|(a, b)| apart(a, b)).fold(0.0, f32::max);
                    assert!(apart < bound, "adapter {number} on {name}, {compute:?}, {isa:?}: {apart:e} apart");
                }
            }
        }
    }
    Ok(())
}

/// What answers has the adapter as it was made ready with, whole: a prompt is not read by other values than tokens are decoded by.
#[test]
fn values_that_change_later_change_no_answer() -> Result<()> {
    let model = Arc::new(model("llama")?);
    let (prompt, tokens) = (ids(&model, 41, 1), ids(&model, 3, 5));
    for compute in [Compute::F32, Compute::Bf16] {
        let adaptation = adaptations(&model)?.remove(2).context("an adapter")?;
        let ready = made_ready(&model, Some(adaptation.clone()), compute)?;
        let before = logits(&ready, &prompt, 17, &tokens)?;
        for param in &adaptation.params {
            param.var.set(&param.var.zeros_like()?)?;
        }
        assert_eq!(logits(&ready, &prompt, 17, &tokens)?, before, "{compute:?}");
        let anew = made_ready(&model, Some(adaptation), compute)?;
        assert_ne!(logits(&anew, &prompt, 17, &tokens)?, before, "{compute:?}");
    }
    Ok(())
}

/// Mean over positions of Kullback and Leibler's divergence of softmax(b) from softmax(a), in nats.
fn divergence(a: &[Vec<f32>], b: &[Vec<f32>]) -> f64 {
    let log_softmax = |logits: &[f32]| -> Vec<f64> {
        let most = logits.iter().fold(f32::MIN, |most, x| most.max(*x));
        let sum: f64 = logits.iter().map(|x| f64::from(x - most).exp()).sum();
        logits.iter().map(|x| f64::from(x - most) - sum.ln()).collect()
    };
    let of_position = |(a, b): (&Vec<f32>, &Vec<f32>)| -> f64 {
        log_softmax(a).into_iter().zip(log_softmax(b)).map(|(a, b)| a.exp() * (a - b)).sum()
    };
    a.iter().zip(b).map(of_position).sum::<f64>() / a.len() as f64
}

#[test]
fn a_real_model_draws_in_eight_bits_from_nearly_the_same_tokens_as_in_f32() -> Result<()> {
    let model = Arc::new(BaseModel::load(&crate::real_model::smollm2()?)?);
    let nf4 = Arc::new(store_as(&model, &StoredAs::Codec(Codec::nf4()), None, |_, _| {})?);
    let text = "The water cycle moves water between the sea, the air and the land. The sun warms the sea, water rises as vapour, \
        cools into clouds and falls as rain or snow. Rivers carry it back, and plants give some of it to the air again. In \
        this lesson each group draws one step of the cycle and explains to the others what drives it.";
    let ids = model.tokenizer.encode(text, false)?.ids;
    let (first, rest) = ids.split_at(1);
    for (name, model) in [("as it is stored", &model), ("in NF4", &nf4)] {
        let exact = logits(&made_ready(model, None, Compute::F32)?, first, 1, rest)?;
        let fast = logits(&made_ready(model, None, Compute::Bf16)?, first, 1, rest)?;
        let away = divergence(&exact, &fast);
        println!("{name}: divergence from f32 over {} tokens: {away:.2e} nats", ids.len());
        // Beside it, what rounding to bf16 costs when a prompt is read.
        let read = |compute| -> Result<Vec<Vec<f32>>> {
            let ready = made_ready(model, None, compute)?;
            (1..=ids.len()).map(|len| Ok(logits(&ready, &ids[..len], len, &[])?.remove(0))).collect()
        };
        let reading = divergence(&read(Compute::F32)?, &read(Compute::Bf16)?);
        println!("{name}: of a prompt that is read in bf16: {reading:.2e} nats");
        let losses = [&exact, &fast].map(|logits| loss(logits, &ids[1..]));
        println!("{name}: loss of the text, f32 and in eight bits: {losses:.5?}");
        assert!(away < 0.01 && away > 0.0, "{name}: {away:e} nats");
        assert!((losses[0] - losses[1]).abs() < 0.02, "{name}: {losses:?}");
    }
    Ok(())
}

/// AVX-VNNI multiplies bytes much faster than floats.
/// Processors whose floats are multiplied in 256 bits, as far as this one can be held to them.
fn of_256_bits() -> Vec<(Isa, Feature)> {
    let all = [(Isa::AVX2, Feature::Avx2), (Isa::AVXVNNI, Feature::AvxVnni)];
    all.into_iter().filter(|(_, feature)| Isa::detected().has(*feature)).collect()
}

#[test]
fn a_prompt_is_read_in_integers_where_they_are_faster_and_its_pieces_change_no_bit() -> Result<()> {
    for (isa, _) in of_256_bits() {
        with_isa(isa, || -> Result<()> {
            let model = Arc::new(model("llama-gguf/model-mixed.gguf")?);
            let (prompt, tokens) = (ids(&model, 61, 1), ids(&model, 3, 5));
            let exact = made_ready(&model, None, Compute::F32)?;
            let exact = logits(&exact, &prompt, prompt.len(), &[])?;
            for compute in [Compute::Auto, Compute::Int8] {
                let fast = made_ready(&model, None, compute)?;
                let whole = logits(&fast, &prompt, prompt.len(), &tokens)?;
                let apart = apart(&whole[0], &exact[0]);
                assert!(apart > 1e-4 && apart < 0.2, "{compute:?} on {}: {apart:e}", isa.name());
                for pieces in [1, 7, 50] {
                    let by_pieces = logits(&fast, &prompt, pieces, &tokens)?;
                    assert!(by_pieces == whole, "{compute:?} on {}, by {pieces}", isa.name());
                }
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_real_model_that_reads_in_integers_draws_from_nearly_the_same_tokens_as_in_f32() -> Result<()> {
    let model = Arc::new(BaseModel::load(&crate::real_model::smollm2()?)?);
    let text = "Plants make sugar out of water and air with the light of the sun. Animals eat plants, or other animals that did, and so \
        all of them live on what leaves have caught.";
    let ids = model.tokenizer.encode(text, false)?.ids;
    for (isa, _) in of_256_bits() {
        with_isa(isa, || -> Result<()> {
            let read = |compute| -> Result<Vec<Vec<f32>>> {
                let ready = made_ready(&model, None, compute)?;
                (1..=ids.len()).map(|len| Ok(logits(&ready, &ids[..len], len, &[])?.remove(0))).collect()
            };
            let exact = read(Compute::F32)?;
            // Unasked by weights as they are stored, which rounds no more than drawing tokens does.
            let unasked = divergence(&exact, &read(Compute::Auto)?);
            println!("of a prompt that is read in integers on {}: {unasked:.2e} nats", isa.name());
            assert!(unasked < 0.006 && unasked > 0.0, "{unasked:e} nats");
            // Measured where weights are rounded anew, in other groups than they are stored in: 0.0107.
            let asked = divergence(&exact, &read(Compute::Int8)?);
            println!("asked for int8: {asked:.2e} nats");
            assert!(asked < 0.02 && asked > 0.0, "{asked:e} nats");
            Ok(())
        })?;
    }
    Ok(())
}

/// Mean cross-entropy of tokens under the logits before each.
fn loss(logits: &[Vec<f32>], tokens: &[u32]) -> f64 {
    let of = |(logits, token): (&Vec<f32>, &u32)| {
        let most = logits.iter().fold(f32::MIN, |most, x| most.max(*x));
        let sum: f64 = logits.iter().map(|x| f64::from(x - most).exp()).sum();
        sum.ln() - f64::from(logits[*token as usize] - most)
    };
    logits.iter().zip(tokens).map(of).sum::<f64>() / tokens.len() as f64
}

#[test]
fn the_pieces_of_a_prompt_change_no_bit() -> Result<()> {
    for name in ["llama", "mistral", "llama-gguf/model-mixed.gguf"].into_iter().chain(FAMILIES) {
        let model = Arc::new(model(name)?);
        let (prompt, tokens) =
            (ids(&model, 100.min(model.architecture.max_position_embeddings - 4), 2), ids(&model, 4, 3));
        for compute in [Compute::F32, Compute::Bf16] {
            let ready = made_ready(&model, None, compute)?;
            let whole = logits(&ready, &prompt, prompt.len(), &tokens)?;
            for pieces in [1, 7, 64] {
                assert!(logits(&ready, &prompt, pieces, &tokens)? == whole, "{name}, {compute:?}, by {pieces}");
            }
        }
    }
    Ok(())
}

#[test]
fn sequences_that_are_decoded_together_have_the_logits_that_each_has_alone() -> Result<()> {
    for (name, model) in cases()? {
        for adaptation in adaptations(&model)? {
            for compute in [Compute::F32, Compute::Bf16, Compute::Plain] {
                let ready = made_ready(&model, adaptation.clone(), compute)?;
                let (inference, adapter) = (&ready.0, ready.1.as_deref());
                let prompts: Vec<Vec<u32>> = (0..6).map(|i| ids(&model, 3 + 5 * i, i as u32)).collect();
                let tokens: Vec<Vec<u32>> = (0..6).map(|i| ids(&model, 3, 20 + i)).collect();
                let mut kept = Vec::new();
                for prompt in &prompts {
                    let mut one = inference.begin(adapter);
                    inference.read(adapter, prompt, &mut *one, prompt.len(), false)?;
                    kept.push(one);
                }
                let mut together = vec![Vec::new(); 6];
                for step in 0..3 {
                    let caches = kept.iter_mut().map(|cache| &mut **cache);
                    let mut sequences: Vec<(u32, &mut dyn KvCache)> =
                        tokens.iter().map(|tokens| tokens[step]).zip(caches).collect();
                    for (all, logits) in together.iter_mut().zip(inference.step(adapter, &mut sequences)?) {
                        all.push(logits);
                    }
                }
                for ((prompt, tokens), together) in prompts.iter().zip(&tokens).zip(together) {
                    let alone = logits(&ready, prompt, prompt.len(), tokens)?;
                    assert!(alone[1..] == together, "{name}, {compute:?}: company changes what is answered");
                }
            }
        }
    }
    Ok(())
}

fn engine(model: &Arc<BaseModel>, compute: Compute) -> Engine {
    Engine::new(model.clone(), compute)
}

fn sampling(seed: u64) -> Sampling {
    Sampling { max_tokens: 20, temperature: 0.9, top_p: 0.95, seed, ..Sampling::default() }
}

#[test]
fn answers_that_are_drawn_at_once_are_those_that_each_is_alone() -> Result<()> {
    for name in ["llama", "gemma3", "phi4-mini", "qwen3"] {
        answers_alone_and_together(name)?;
    }
    Ok(())
}

fn answers_alone_and_together(name: &str) -> Result<()> {
    let model = Arc::new(model(name)?);
    for compute in [Compute::F32, Compute::Bf16, Compute::Plain] {
        // More than are drawn together, some with the same beginning, some twice.
        let shared = ids(&model, 40, 1);
        let prompts: Vec<Vec<u32>> = (0..20)
            .map(|i| match i % 3 {
                0 => ids(&model, 5 + 2 * i, i as u32),
                _ => [&shared[..], &ids(&model, i % 7, 3)].concat(),
            })
            .collect();
        let mut alone = Vec::new();
        for (prompt, seed) in prompts.iter().zip(0..) {
            alone.push(generate(&engine(&model, compute), None, prompt, sampling(seed))?.ids);
        }
        assert!(alone.iter().any(|ids| ids != &alone[0]) && alone.iter().any(|ids| ids.len() > 5));
        let engine = engine(&model, compute);
        for _ in 0..2 {
            let asked = prompts.iter().zip(0..).map(|(prompt, seed)| engine.ask(None, prompt, sampling(seed)));
            let asked = asked.collect::<Result<Vec<_>>>()?;
            for (number, (tokens, alone)) in asked.into_iter().zip(&alone).enumerate() {
                let ids = tokens.collect::<Result<Vec<u32>>>()?;
                assert_eq!(&ids, alone, "answer {number} of {name}, {compute:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn an_answer_that_nobody_waits_for_makes_room_for_others() -> Result<()> {
    let mut endless = model("llama")?;
    let mut tokenizer = homeroom_engine::text::tokenizer::Tokenizer::from_dir(&endless.path)?;
    tokenizer.eos_ids.clear();
    endless.tokenizer = tokenizer.into();
    let engine = engine(&Arc::new(endless), Compute::F32);
    let prompt = [1, 40, 41];
    let long = Sampling { max_tokens: 1 << 20, ..sampling(1) };
    let dropped: Vec<_> = (0..40).map(|_| engine.ask(None, &prompt, long)).collect::<Result<_>>()?;
    drop(dropped);
    assert!(!generate(&engine, None, &prompt, sampling(2))?.ids.is_empty());
    Ok(())
}

/// Two models draw at once; the longest run of one's tokens stays short.
#[test]
fn models_take_turns() -> Result<()> {
    let mut endless = model("llama")?;
    let mut tokenizer = homeroom_engine::text::tokenizer::Tokenizer::from_dir(&endless.path)?;
    tokenizer.eos_ids.clear();
    endless.tokenizer = tokenizer.into();
    let endless = Arc::new(endless);
    let (one, other) = (engine(&endless, Compute::F32), engine(&endless, Compute::F32));
    let long = Sampling { max_tokens: 150, ..sampling(1) };
    let (sender, order) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        for (name, engine) in [("one", &one), ("other", &other)] {
            let sender = sender.clone();
            scope.spawn(move || {
                for token in engine.ask(None, &[1, 40, 41], long).expect("it is asked") {
                    let sent = token.is_ok() && sender.send(name).is_ok();
                    assert!(sent);
                }
            });
        }
    });
    drop(sender);
    let order: Vec<&str> = order.iter().collect();
    assert_eq!(order.len(), 300);
    // While both draw, the first half of all tokens is of both.
    let of_one = order[..150].iter().filter(|name| **name == "one").count();
    assert!((40..=110).contains(&of_one), "{of_one} of the first 150 tokens are of one of the two");
    Ok(())
}

#[test]
fn a_token_without_an_embedding_fails_its_answer_and_no_other() -> Result<()> {
    let model = Arc::new(model("llama")?);
    let engine = engine(&model, Compute::F32);
    let good = [1, 40, 41];
    let fine = engine.ask(None, &good, sampling(1))?;
    let mut wrong = engine.ask(None, &[1, model.architecture.vocab_size as u32], sampling(1))?;
    let error = wrong.next().context("it fails")?.expect_err("the token is unknown");
    assert!(error.to_string().contains("has no embedding"), "{error}");
    assert!(wrong.next().is_none(), "after its error an answer is over");
    assert_eq!(fine.collect::<Result<Vec<u32>>>()?, generate(&engine, None, &good, sampling(1))?.ids);
    Ok(())
}

/// Five adapters, one of which runs plain blocks, and the base alone, on one engine.
#[test]
fn adapters_on_one_base_answer_at_once_as_each_does_alone() -> Result<()> {
    let model = Arc::new(model("llama")?);
    let plain = Arc::new(shake(adapt("ia3", &json!({}), &model, 3)?)?);
    let adaptations = [adaptations(&model)?, vec![Some(plain)]].concat();
    let prompt = ids(&model, 60, 1);
    for compute in [Compute::F32, Compute::Bf16] {
        let made = |engine: &Engine, adaptation: &Option<Arc<Adaptation>>| {
            let adaptation = adaptation.clone();
            adaptation.map(|adaptation| Adapter::new(engine.inference(), model.clone(), adaptation)).transpose()
        };
        let mut alone = Vec::new();
        for adaptation in &adaptations {
            let engine = engine(&model, compute);
            alone.push(generate(&engine, made(&engine, adaptation)?.as_ref(), &prompt, sampling(1))?.ids);
        }
        assert!(
            (1..alone.len()).all(|i| !alone[..i].contains(&alone[i])),
            "each adapter says something else: {alone:?}"
        );
        let engine = engine(&model, compute);
        let adapters = adaptations.iter().map(|adaptation| made(&engine, adaptation)).collect::<Result<Vec<_>>>()?;
        // Twice one after another, where a beginning that another adapter read must not be taken over; then all at once.
        for _ in 0..2 {
            for (adapter, alone) in adapters.iter().zip(&alone) {
                assert_eq!(&generate(&engine, adapter.as_ref(), &prompt, sampling(1))?.ids, alone, "{compute:?}");
            }
        }
        let asked = (0..3).flat_map(|_| &adapters).map(|adapter| engine.ask(adapter.as_ref(), &prompt, sampling(1)));
        for (number, tokens) in asked.collect::<Result<Vec<_>>>()?.into_iter().enumerate() {
            let ids = tokens.collect::<Result<Vec<u32>>>()?;
            assert_eq!(ids, alone[number % alone.len()], "request {number}, {compute:?}");
        }
    }
    Ok(())
}

#[test]
fn an_adapter_of_another_base_is_refused() -> Result<()> {
    let (one, other) = (Arc::new(model("llama")?), Arc::new(model("llama")?));
    let adaptation = adaptations(&one)?.remove(1).context("an adapter")?;
    let (engine_of_one, engine_of_other) = (engine(&one, Compute::F32), engine(&other, Compute::F32));
    let refused = Adapter::new(engine_of_other.inference(), one.clone(), adaptation.clone());
    assert!(format!("{:#}", refused.err().context("its weights are others")?).contains("other weights"));
    let adapter = Adapter::new(engine_of_one.inference(), one, adaptation)?;
    let refused = engine_of_other.ask(Some(&adapter), &[1, 2], sampling(1));
    assert!(format!("{:#}", refused.err().context("it is on another base")?).contains("another base"));
    Ok(())
}
