//! The native engine: what is drawn does not depend on scheduling, and what is recorded is what the
//! update would compute.

use candle_core::DType;

use super::batch::common_prefix;
use super::{Ask, Completion, Engine, FinishReason, NativeEngine, Request, SamplingParams};
use crate::model::{
    Batch as Packed, BatchInputs, BlockInputs, Coefficients, Keep, Placement, Tokenizer,
    tests as fixtures,
};
use crate::ops::Backend;

/// Words `w0`, `w1`, … with id 0 as the end of a sequence.
fn tokenizer(vocab: usize) -> Tokenizer {
    let words: serde_json::Map<String, serde_json::Value> =
        (0..vocab).map(|id| (format!("w{id}"), id.into())).collect();
    let json = serde_json::json!({
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w1"},
    });
    let dir = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(dir.path().join("tokenizer.json"), json.to_string()).expect("written");
    Tokenizer::from_hf_dir(dir.path(), &fixtures::config(true)).expect("a tokenizer")
}

fn params() -> SamplingParams {
    SamplingParams {
        temperature: 0.7,
        top_p: 1.0,
        top_k: 0,
        min_p: 0.0,
        max_tokens: 12,
        stop: Vec::new(),
        eos: vec![0, 5],
        seed: 1,
        step: 2,
    }
}

fn requests() -> Vec<Request> {
    let prompt = |id: u64, len: u32, n: usize| Request {
        id,
        prompt: (1..=len).collect(),
        n,
    };
    vec![
        prompt(7, 5, 4),
        prompt(8, 1, 0),
        prompt(9, 20, 3),
        prompt(10, 2, 1),
    ]
}

fn generate(max_batch_size: usize, params: &SamplingParams) -> Vec<Vec<Completion>> {
    generate_on(Placement::cpu(DType::F32), max_batch_size, params)
}

fn generate_on(
    placement: Placement,
    max_batch_size: usize,
    params: &SamplingParams,
) -> Vec<Vec<Completion>> {
    let decoder = fixtures::decoder(placement);
    let adapter = fixtures::adapter(&decoder);
    let tokenizer = tokenizer(decoder.config.vocab_size);
    let mut engine = NativeEngine::new(&decoder, &tokenizer, max_batch_size);
    let mut finished = 0;
    let all = engine
        .generate(
            Some(&adapter),
            &requests(),
            params,
            &mut |_, _, _| {},
            &mut |_, _, _| finished += 1,
        )
        .expect("completions");
    assert_eq!(finished, 8);
    assert_eq!(all.iter().map(Vec::len).collect::<Vec<_>>(), [4, 0, 3, 1]);
    all
}

#[test]
fn completions_do_not_depend_on_the_batch_size() {
    let alone = generate(1, &params());
    assert_eq!(alone, generate(3, &params()));
    assert_eq!(alone, generate(64, &params()));
    let lengths: Vec<usize> = alone.iter().flatten().map(|c| c.tokens.len()).collect();
    assert!(lengths.iter().any(|&l| l < 12), "none ended: {lengths:?}");
    let next_step = SamplingParams {
        step: 3,
        ..params()
    };
    assert_ne!(alone, generate(64, &next_step));
}

#[test]
fn the_samplers_log_probabilities_are_those_of_the_scorer_to_the_bit() {
    let decoder = fixtures::decoder(Placement::cpu(DType::F32));
    let adapter = fixtures::adapter(&decoder);
    for (request, completions) in requests().iter().zip(generate(64, &params())) {
        if completions.is_empty() {
            continue;
        }
        let tokens: Vec<&[u32]> = completions.iter().map(|c| &c.tokens[..]).collect();
        let mut batch = Packed::default();
        batch.push_group(&request.prompt, &tokens).expect("valid");
        let scores = decoder.score(Some(&adapter), &batch, 0.7).expect("scores");
        let sampled: Vec<f64> = completions
            .iter()
            .flat_map(|c| c.logprobs.iter().map(|&l| f64::from(l)))
            .collect();
        assert_eq!(scores.logprobs, sampled);
    }
}

#[test]
fn a_beginning_that_all_prompts_share_changes_nothing() {
    let cpu = Placement::cpu(DType::F32);
    let portable = Placement {
        backend: Backend::Portable,
        ..cpu.clone()
    };
    // Only the CPU path promises the same bits.
    assert_prefix_is_harmless(cpu, 0.0);
    assert_prefix_is_harmless(portable, 1e-5);
}

fn assert_prefix_is_harmless(placement: Placement, tolerance: f32) {
    let decoder = fixtures::decoder(placement);
    let adapter = fixtures::adapter(&decoder);
    let tokenizer = tokenizer(decoder.config.vocab_size);
    let shots: Vec<u32> = (0..35).map(|i| 1 + i * 7 % 30).collect();
    let request = |id: u64, own: &[u32]| Request {
        id,
        prompt: [&shots[..], own].concat(),
        n: 2,
    };
    let requests = [
        request(1, &[3, 4, 5]),
        request(2, &[3, 9]),
        request(3, &[3]),
    ];
    let prompts: Vec<&[u32]> = requests.iter().map(|r| &r.prompt[..]).collect();
    assert_eq!(common_prefix(&prompts), 35);
    assert_eq!(common_prefix(&prompts[..1]), 0);
    let mut engine = NativeEngine::new(&decoder, &tokenizer, 4);
    let mut generate = |requests: &[Request]| {
        engine
            .generate(
                Some(&adapter),
                requests,
                &params(),
                &mut |_, _, _| {},
                &mut |_, _, _| {},
            )
            .expect("completions")
    };
    let together = generate(&requests);
    let alone: Vec<_> = requests
        .iter()
        .flat_map(|r| generate(std::slice::from_ref(r)))
        .collect();
    for (together, alone) in together
        .iter()
        .zip(&alone)
        .flat_map(|(a, b)| a.iter().zip(b))
    {
        assert_eq!(together.tokens, alone.tokens);
        for (a, b) in together.logprobs.iter().zip(&alone.logprobs) {
            assert!((a - b).abs() <= tolerance, "{a} {b}");
        }
    }
    assert_eq!(together.len(), alone.len());
}

#[test]
fn completions_end_for_the_reason_they_say() {
    for completion in generate(64, &params()).iter().flatten() {
        let last = completion.tokens[completion.tokens.len() - 1];
        let ended = [0, 5].contains(&last);
        match completion.finish {
            FinishReason::Eos => assert!(ended),
            FinishReason::Length => assert!(!ended && completion.tokens.len() == 12),
            FinishReason::Stop => panic!("no stop string was given"),
        }
        let before = &completion.tokens[..completion.tokens.len() - 1];
        assert!(!before.iter().any(|t| [0, 5].contains(t)));
    }
    let stop = SamplingParams {
        stop: vec!["w3".into()],
        ..params()
    };
    let completions = generate(64, &stop);
    let stopped: Vec<_> = completions
        .iter()
        .flatten()
        .filter(|c| c.finish == FinishReason::Stop)
        .collect();
    assert!(!stopped.is_empty());
    assert!(stopped.iter().all(|c| !c.text.contains("w3")));
}

#[test]
fn greedy_samples_of_a_prompt_are_equal() {
    let greedy = SamplingParams {
        temperature: 0.0,
        ..params()
    };
    let completions = generate(2, &greedy);
    assert!(completions[0].iter().all(|c| *c == completions[0][0]));
}

#[test]
fn a_token_outside_the_vocabulary_is_refused() {
    let decoder = fixtures::decoder(Placement::cpu(DType::F32));
    let tokenizer = tokenizer(decoder.config.vocab_size);
    let mut engine = NativeEngine::new(&decoder, &tokenizer, 4);
    let request = Request {
        id: 0,
        prompt: vec![1, 99],
        n: 1,
    };
    let refused = engine
        .generate(
            None,
            &[request],
            &params(),
            &mut |_, _, _| {},
            &mut |_, _, _| {},
        )
        .expect_err("id 99 of 37");
    assert!(refused.to_string().contains("99"), "{refused}");
}

#[test]
fn decoding_in_lanes_draws_what_the_cpu_draws() {
    let portable = Placement {
        backend: Backend::Portable,
        ..Placement::cpu(DType::F32)
    };
    // Completions of all lengths, so that lanes become free and are taken again.
    let expected = generate(4, &params());
    let lengths: Vec<usize> = expected.iter().flatten().map(|c| c.tokens.len()).collect();
    assert!(
        lengths.iter().any(|&len| len < 12) && lengths.contains(&12),
        "{lengths:?}"
    );
    for max_batch_size in [1, 3, 16] {
        let got = generate_on(portable.clone(), max_batch_size, &params());
        for (got, expected) in got.iter().flatten().zip(expected.iter().flatten()) {
            assert_eq!(got.tokens, expected.tokens, "{max_batch_size}");
            for (got, expected) in got.logprobs.iter().zip(&expected.logprobs) {
                assert!((got - expected).abs() < 1e-4, "{got} {expected}");
            }
        }
    }
}

/// Completions by run, request and sample.
type ByRun = Vec<Vec<Vec<Completion>>>;

/// Four runs: two adapters with A and B in common, the model alone; other seeds, lengths, temperatures.
/// What each of them draws together with the others, and alone.
fn several(placement: Placement) -> (ByRun, ByRun) {
    let decoder = fixtures::decoder(placement);
    let first = fixtures::adapter(&decoder);
    let mut second = first.clone();
    let moved: Vec<f32> = first.parameters().iter().map(|v| 0.2 - v).collect();
    second.set_parameters(&moved).expect("finite");
    assert!(second.shares_factors(&first));
    let tokenizer = tokenizer(decoder.config.vocab_size);
    let (own, other) = (
        params(),
        SamplingParams {
            seed: 9,
            max_tokens: 5,
            eos: vec![3],
            temperature: 1.1,
            ..params()
        },
    );
    let (requests, fewer) = (requests(), &requests()[2..]);
    let ask = |adapter, requests, params| Ask {
        adapter,
        requests,
        params,
        budget: 0,
    };
    let asks = [
        ask(Some(&first), &requests[..], &own),
        ask(Some(&second), fewer, &own),
        ask(Some(&second), &requests[..], &other),
        ask(None, &requests[..], &own),
    ];
    let engine = NativeEngine::new(&decoder, &tokenizer, 7);
    let answer = |asks: &[Ask<'_>]| -> ByRun {
        let mut finished = Vec::new();
        let answers = engine
            .answer(asks, &mut |_, _, _| {}, &mut |place, sample, _| {
                finished.push((place, sample));
            })
            .expect("completions");
        let expected = asks.iter().flat_map(|ask| ask.requests).map(|r| r.n);
        assert_eq!(finished.len(), expected.sum::<usize>());
        answers.into_iter().map(|a| a.completions).collect()
    };
    // On one thread, where all of them share every pass.
    let together = crate::ops::cpu::alone(|| answer(&asks));
    assert_eq!(together, answer(&asks));
    (
        together,
        asks.iter().flat_map(|ask| answer(&[*ask])).collect(),
    )
}

#[test]
fn runs_that_share_passes_draw_what_each_draws_alone() {
    let (together, alone) = several(Placement::cpu(DType::F32));
    assert_eq!(together, alone);
    let different = |a: usize, b: usize| assert_ne!(alone[a], alone[b], "{a} {b}");
    different(0, 2);
    different(0, 3);
    assert!(alone[2].iter().flatten().all(|c| c.tokens.len() <= 5));
    let portable = Placement {
        backend: Backend::Portable,
        ..Placement::cpu(DType::F32)
    };
    let (together, alone) = several(portable);
    let flat =
        |all: &ByRun| -> Vec<Completion> { all.iter().flatten().flatten().cloned().collect() };
    for (together, alone) in flat(&together).iter().zip(flat(&alone)) {
        assert_eq!(together.tokens, alone.tokens);
        for (a, b) in together.logprobs.iter().zip(&alone.logprobs) {
            assert!((a - b).abs() < 1e-4, "{a} {b}");
        }
    }
}

/// Gradients of a group's log-probabilities: from what the rollout recorded where it was, and from a
/// forward pass.
fn gradients_both_ways(requests: &[Request], budget: usize) -> Vec<Option<[Vec<f64>; 2]>> {
    let decoder = fixtures::decoder(Placement::cpu(DType::F32));
    let adapter = fixtures::adapter(&decoder);
    let tokenizer = tokenizer(decoder.config.vocab_size);
    let mut engine = NativeEngine::new(&decoder, &tokenizer, 3);
    engine.record(budget);
    let ignore = &mut |_: usize, _: usize, _: &[u32]| {};
    let completions = engine
        .generate(
            Some(&adapter),
            requests,
            &params(),
            ignore,
            &mut |_, _, _| {},
        )
        .expect("completions");
    let groups = requests.iter().zip(completions).zip(engine.take_recorded());
    groups
        .map(|((request, completions), recorded)| {
            let tokens: Vec<&[u32]> = completions.iter().map(|c| &c.tokens[..]).collect();
            let mut batch = Packed::default();
            batch.push_group(&request.prompt, &tokens).expect("valid");
            let gradient = |inputs: BlockInputs| {
                let mut gradients = adapter.gradients();
                let known = (0..batch.targets.len()).map(|i| i as f64 - 3.5).collect();
                let known = Coefficients::Known(known);
                decoder
                    .accumulate_gradients(&adapter, &batch, 0.7, inputs, known, &mut gradients)
                    .expect("a gradient");
                gradients.sum()
            };
            let mut inputs = BatchInputs::default();
            inputs.push_group(&recorded?);
            let computed = gradient(Keep::Activations.into());
            assert!(computed.iter().any(|&x| x != 0.0));
            Some([gradient(BlockInputs::Recorded(inputs)), computed])
        })
        .collect()
}

#[test]
fn recorded_inputs_give_the_gradient_of_a_forward_pass_to_the_bit() {
    let with_prefix: Vec<Request> = requests()
        .into_iter()
        .map(|mut request| {
            request.prompt.splice(0..0, (0..40).map(|i| 1 + i * 7 % 30));
            request
        })
        .collect();
    for requests in [requests(), with_prefix] {
        let groups = gradients_both_ways(&requests, usize::MAX / 2);
        for (request, gradients) in requests.iter().zip(groups) {
            assert_eq!(gradients.is_some(), request.n > 0, "request {}", request.id);
            if let Some([recorded, computed]) = gradients {
                assert_eq!(recorded, computed, "request {}", request.id);
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_not_recorded() {
    let row = fixtures::config(true).input_bytes();
    // One request is not divided between threads. It has 5 rows and 4 completions of up to 11.
    let recorded = |budget: usize| gradients_both_ways(&requests()[..1], budget)[0].is_some();
    assert!(recorded(49 * row));
    assert!(!recorded(48 * row));
    assert!(!recorded(0));
    let all = gradients_both_ways(&requests(), 49 * row);
    assert!(all.iter().any(Option::is_none));
}
