//! Chat templates that try to take all memory, all time or all of the stack: refused by name within
//! their bounds. A process of its own, since what one of them held stays held.

use std::alloc::{GlobalAlloc, Layout};
use std::path::Path;
use std::sync::atomic::{AtomicIsize, Ordering};
use std::time::{Duration, Instant};

use tinylora::bounded::Allocator;
use tinylora::model::{ChatMessage, ModelConfig, Tokenizer};

/// Counts what the whole process holds, and the most it has held.
struct Counting;

static HELD: AtomicIsize = AtomicIsize::new(0);
static MOST: AtomicIsize = AtomicIsize::new(0);

fn count(bytes: isize) {
    let held = HELD.fetch_add(bytes, Ordering::Relaxed) + bytes;
    MOST.fetch_max(held, Ordering::Relaxed);
}

// SAFETY: every call goes to the program's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise is that of `Allocator`.
        let memory = unsafe { Allocator.alloc(layout) };
        count(layout.size() as isize);
        memory
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as above.
        unsafe { Allocator.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A folder with the embedded model's tokenizer and this template.
fn tokenizer(folder: &Path, template: &str) -> Tokenizer {
    let mini = tinylora::data::mini::directory().unwrap();
    for name in ["config.json", "tokenizer.json"] {
        std::fs::copy(mini.join(name), folder.join(name)).unwrap();
    }
    std::fs::write(folder.join("chat_template.jinja"), template).unwrap();
    let config = ModelConfig::from_hf_dir(folder).unwrap();
    Tokenizer::from_hf_dir(folder, &config).unwrap()
}

/// Most memory, and what a refusal may take.
const MEMORY: isize = 200 << 20;
const TIME: Duration = Duration::from_secs(1);

#[test]
fn templates_are_held_to_their_share_of_memory_time_and_stack() {
    let block = |body: &str| {
        format!("{{% set ns = namespace(a='x', b=[]) %}}{body}{{{{ ns.a | length }}}}")
    };
    let times = |body: &str| {
        block(&format!(
            "{{% for i in range(10000) %}}{body}{{% endfor %}}"
        ))
    };
    let chain = |first: &str, link: &str| {
        let links = ((128 << 10) - 100) / link.len();
        format!("{{{{ {first}{} }}}}", link.repeat(links))
    };
    let many = "m.content".to_owned();
    let hostile = [
        ("doubling by ~", times("{% set ns.a = ns.a ~ ns.a %}")),
        ("doubling by +", times("{% set ns.a = ns.a + ns.a %}")),
        (
            "doubling by join",
            times("{% set ns.a = [ns.a, ns.a] | join %}"),
        ),
        (
            "doubling by replace",
            times("{% set ns.a = ns.a | replace('x', 'xx') %}"),
        ),
        (
            "doubling by a method",
            times("{% set ns.a = ns.a.replace('x', 'xx') %}"),
        ),
        (
            "doubling by format",
            times("{% set ns.a = '%s%s' | format(ns.a, ns.a) %}"),
        ),
        (
            "doubling by a block",
            times("{% set t %}{{ ns.a }}{{ ns.a }}{% endset %}{% set ns.a = t %}"),
        ),
        (
            "doubling by a macro",
            times("{% macro d(s) %}{{ s }}{{ s }}{% endmacro %}{% set ns.a = d(ns.a) %}"),
        ),
        (
            "doubling lists",
            times("{% set ns.b = ns.b + [1] + ns.b %}{{ ns.b | length }}"),
        ),
        (
            "lists of lists",
            times("{% set ns.b = [ns.b, ns.b] %}") + "{{ ns.b }}",
        ),
        (
            "compared lists of lists",
            times("{% set ns.b = [ns.b, ns.b] %}") + "{{ ns.b == [ns.b[0], ns.b[0]] }}",
        ),
        ("repeated text", "{{ 'x' * 10**9 }}".to_owned()),
        (
            "much repeated text",
            "{% for i in range(99) %}{{ 'x' * 10**8 }}{% endfor %}".to_owned(),
        ),
        (
            "constants",
            format!("{{{{ {} | length }}}}", vec!["'x' * 10**8"; 30].join(" ~ ")),
        ),
        (
            "repeated list",
            "{{ ([1] * 10**12) | list | length }}".to_owned(),
        ),
        (
            "a list too long to count",
            "{{ ([1] * 2**62) * 2**62 }}".to_owned(),
        ),
        (
            "wide lines",
            "{{ 'x' | indent(10**9, true) }}{{ 'x' | center(10**9) }}".to_owned(),
        ),
        (
            "formatted wide",
            "{{ '%1000000000d' | format(1) }}{{ '{:1000000000}'.format(1) }}".to_owned(),
        ),
        (
            "batches",
            "{{ [1] | batch(10**10, 0) | list | length }}".to_owned(),
        ),
        (
            "slices",
            "{{ [1] | slice(10**10, 0) | list | length }}".to_owned(),
        ),
        (
            "ranges",
            times("{% set ns.b = range(100000) | list + ns.b %}{{ ns.b | list | length }}"),
        ),
        (
            "long output",
            format!(
                "{{% for i in range(100000) %}}{}{{% endfor %}}",
                "x".repeat(120_000)
            ),
        ),
        ("a chain of +", chain("1", "+1")),
        ("a chain of ~", chain("a", "~a")),
        ("a chain of attributes", chain("messages", ".a")),
        ("a chain of filters", chain("1", "|e")),
        ("a chain of calls", chain("namespace", "()")),
        (
            "a chain of not",
            format!("{{{{ {}1 }}}}", "not ".repeat(32_000)),
        ),
        ("a chain of minus", chain("1", "--1")),
        ("a chain of if", chain("1", " if 1 else 1")),
        (
            "nested lists",
            block(&format!(
                "{{% for i in range(1800) %}}{{% set ns.b = {}ns.b{} %}}{{% endfor %}}",
                "[".repeat(40),
                "]".repeat(40)
            )) + "{{ ns.b }}{{ ns.b | tojson }}{{ ns.b == ns.b }}",
        ),
        (
            "recursion",
            format!(
                "{{% macro f(a) %}}{{{{ f(a ~ a ~ '{}') }}}}{{% endmacro %}}{{{{ f('x') }}}}",
                "x".repeat(1000)
            ),
        ),
        (
            "messages",
            times(&format!(
                "{{% for m in messages %}}{{% set ns.a = ns.a ~ {many} %}}{{% endfor %}}"
            )),
        ),
    ];
    let message = [ChatMessage::new("user", "x".repeat(4096))];
    let (mut slowest, mut most) = (Duration::ZERO, 0);
    for (what, template) in hostile {
        let place = tempfile::tempdir().unwrap();
        let tokenizer = tokenizer(place.path(), &template);
        let held = HELD.load(Ordering::Relaxed);
        MOST.store(held, Ordering::Relaxed);
        let began = Instant::now();
        let result = tokenizer.apply_chat_template(&message, true);
        let time = began.elapsed();
        let memory = MOST.load(Ordering::Relaxed) - held;
        println!(
            "{what}: {} MB, {time:?}, {:?}",
            memory >> 20,
            result.as_ref().map(String::len)
        );
        slowest = slowest.max(time);
        most = most.max(memory);
        if let Err(error) = result {
            assert_eq!(error.exit_code(), 3, "{what}: {error}");
            let named = error.to_string().contains(place.path().to_str().unwrap());
            assert!(named, "{what}: {error}");
            println!("    {error}");
        }
        assert!(memory <= MEMORY, "{what}: {} MB", memory >> 20);
    }
    println!("slowest {slowest:?}, most memory {} MB", most >> 20);
    assert!(slowest < TIME, "{slowest:?}");
}
