//! What the bundled model says, word for word: a change of any weight, kernel, token or draw shows here.

use crate::program::run;

fn answer(args: &[&str]) -> String {
    run([&["run", "tiny", "-q"], args].concat()).ok()
}

#[test]
fn greedy_answers_stay_as_they_are() {
    let greedy = |prompt| answer(&["--temp", "0", "-n", "40", "-p", prompt]);
    assert_eq!(
        greedy("Tell me a story about a brave fox named Lily."),
        "Once upon a time, there was a curious fox named Lily. She lived in the garden. One day, Lily heard a small \
         voice. \"Help! Help!\" It was Luna the bear\n"
    );
    assert_eq!(greedy("What is 27 + 45?"), "27 + 45 = 72\n");
    assert_eq!(greedy("法国的首都是哪里?"), "法国的首都是巴黎。\n");
    assert_eq!(
        greedy("Please write a Python function that checks if a number is even."),
        "```python\ndef is_even(n):\n    return n % 2 == 0\n```\n"
    );
}

#[test]
fn a_seeded_answer_stays_as_it_is() {
    assert_eq!(
        answer(&["--seed", "7", "-n", "24", "-p", "Tell me a story about a cat."]),
        "Leo was a shy little cat who lived in the meadow. Leo had a white ball and loved it very much.\n"
    );
}
