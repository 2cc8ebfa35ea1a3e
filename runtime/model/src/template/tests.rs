//! Templates that grow, nest, hang or are too long: one error each, soon and within little memory.

use super::*;

fn rendered(source: &str) -> Result<String, Failure> {
    rendered_within(&Guard::new(0, usize::MAX), source)
}

fn rendered_within(guard: &Guard, source: &str) -> Result<String, Failure> {
    let list: Value = (0..100).map(|n| Value::from(format!("item {n}"))).collect();
    let root = Value::from_pairs([("list", list), ("text", Value::from("<a> b"))]);
    render(source, &environment(guard), &root)
}

#[track_caller]
fn refused(source: &str) -> String {
    match rendered(source) {
        Err(Failure::Render(error) | Failure::Compile(error)) => error.to_string(),
        other => panic!("{source:.60} gives {:?}", other.map(|text| text.len())),
    }
}

fn looped(body: &str) -> String {
    format!(
        "{{% set ns = namespace(s='xxxxxxxx', l=[1], c=none) %}}{{% for i in range(99999) %}}{body}{{% endfor %}}{{{{ ns.s|length }}}}"
    )
}

#[test]
fn what_multiplies_is_bounded() {
    for body in [
        "{% set ns.s = ns.s ~ ns.s %}",
        "{% set ns.s = ns.s + ns.s %}",
        "{% set ns.s = ns.s * 2 %}",
        "{% set ns.s = 1000000 * 'x' ~ ns.s %}",
        "{% set ns.s = ns.s | replace('x', 'xxxx') %}",
        "{% set ns.s = ns.s.replace('', 'xxxx') %}",
        "{% set ns.s = [ns.s, ns.s] | join %}",
        "{% set ns.s = ns.s.join([ns.s, ns.s, ns.s]) %}",
        "{% set ns.s = ns.s | join('xx') %}",
        "{% set ns.s = '%s%s' | format(ns.s, ns.s) %}",
        "{% set ns.s = '{0}{0}'.format(ns.s) %}",
        "{% set ns.s = ns.s | indent(1000) ~ '\\n' %}",
        "{% set ns.s = ns.s.center(10 ** i) %}",
        "{% set ns.s = [ns.s, [ns.s]] | string %}",
        "{% set ns.s = ns.s | e ~ '<<<<' %}",
        "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}",
        "{% set ns.s %}{% filter upper %}{{ ns.s }}xx{{ ns.s }}{% endfilter %}{% endset %}",
        "{% set ns.l = ns.l + ns.l %}",
        "{% set ns.l = ns.l * 2 %}",
        "{% set ns.l = (ns.l | map('string') | list) + ns.l %}",
        "{% set ns.l = ns.l | batch(99999, 1) | first %}{% set ns.l = ns.l + ns.l %}",
        "{% set ns.l = [ns.l, ns.l] %}",
        "{% set ns.l = {'a': ns.l, 'b': ns.l} %}",
        "{% set ns.l = dict(a=ns.l, b=ns.l) %}",
        "{% set ns.l = (ns.l, ns.l) * 3 %}",
        "{{ ns.s * 100000 }}",
        "{{ ('x' * 1000) ~ ('y' * 1000) }}",
        "{% set a %}{{ 'x' * 10000 }}{% endset %}",
        "{% macro m(a) %}{{ a }}{{ a }}{% endmacro %}{% set ns.s = m(ns.s) %}",
    ] {
        refused(&looped(body));
    }
}

#[test]
fn what_is_large_at_once_is_bounded() {
    for source in [
        "{{ 'x' * 99999999 }}",
        "{{ 99999999 * 'x' }}",
        "{{ ('x' * 99999999) ~ ('x' * 99999999) }}",
        "{{ (1,) * 99999999 }}",
        "{{ [1] * 99999999 == [1] * 99999999 }}",
        "{{ 'x' | indent(100000000000, true) }}",
        "{{ '%100000000000d' | format(1) }}",
        "{{ '%*d' | format(100000000000, 1) }}",
        "{{ '{:>100000000000}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 100000000000) }}",
        "{{ '{:.{p}f}'.format(1.5, p=100000000000) }}",
        "{{ 'x'.ljust(100000000000) }}",
        "{{ 'x'.zfill(100000000000) }}",
        "{{ [1] | batch(100000000000, 1) }}",
        "{{ [1] | slice(100000000000) }}",
        "{{ ('x' * 1000000) | list | sum(start='') }}",
        "{{ ('x' * 4000000) | list | list }}",
        "{{ (list * 1000) | map('replace', '', 'x' * 1000) | join }}",
        "{{ [[]] * 10000 | map('batch', 99999, 1) | list }}",
    ] {
        refused(source);
    }
}

#[test]
fn what_nests_is_bounded_when_made_printed_and_dropped() {
    for body in [
        "{% set ns.l = [ns.l] %}",
        "{% set ns.l = {'a': ns.l} %}",
        "{% set ns.l = (ns.l,) %}",
        "{% set ns.l = namespace(l=ns.l) %}",
        "{% set n = namespace() %}{% set n.next = ns.c %}{% set ns.c = n %}",
        "{% set n = namespace() %}{% if ns.c %}{% set c = ns.c %}{% set c.next = n %}{% endif %}{% set ns.c = n %}",
        "{% set ns.self = ns %}",
        "{% for x in [ns.c] %}{% set ns.c = loop %}{% endfor %}",
        "{% for x in [1] %}{% set ns.c = [loop] %}{% endfor %}",
    ] {
        refused(&looped(body));
    }
    // Lazy sequences do not pile up either.
    for body in [
        "{% set ns.l = ns.l | map('string') %}",
        "{% set ns.l = ns.l[0:] %}",
        "{% set ns.l = [ns.l] | map('reverse') | first %}",
    ] {
        let source = looped(body).replace("99999", "20000");
        // However slow this machine is.
        if let Err(error) = rendered_within(&Guard::new(0, usize::MAX).patient(), &source) {
            panic!("{body}: {error:?}");
        }
    }
}

#[test]
fn what_takes_long_is_stopped() {
    refused(
        "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}",
    );
    refused("{% set l = (list * 1000) %}{% for a in range(9999) %}{% if l == l %}{% endif %}{% endfor %}{{ 1 // 0 }}");
    refused("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}");
    refused("{{ (list * 1000) | select('in', list * 1000 + [1]) | list | length ~ (1 // 0) }}");
}

#[test]
fn long_chains_have_an_end_and_a_stack_that_suffices() {
    let chains = |n: usize| {
        [
            format!("{{{{ {}1 }}}}", "-".repeat(n)),
            format!("{{{{ {}1 }}}}", "not ".repeat(n)),
            format!("{{{{ 1{} }}}}", "+1".repeat(n / 2)),
            format!("{{{{ text{} }}}}", " ~ 'a'".repeat(n / 2)),
            format!("{{{{ 1{} }}}}", "**1".repeat(n / 2)),
            format!("{{{{ 1{} }}}}", "*1".repeat(n / 2)),
            format!("{{{{ 1{} }}}}", "|abs".repeat(n / 2)),
            format!("{{{{ text{} }}}}", ".b".repeat(n / 2)),
            format!("{{{{ text{} }}}}", "[0]".repeat(n / 3)),
            format!("{{{{ 1{} }}}}", " if 1 else 1".repeat(n / 4)),
            format!("{{{{ 1{} }}}}", " == 1".repeat(n / 2)),
            format!("{{{{ 1{} }}}}", " and 1".repeat(n / 2)),
            format!("{{{{ 1{} }}}}", " is defined".repeat(n / 2)),
            format!("{{% if 1 %}}x{}{{% endif %}}", "{% elif 1 %}x".repeat(n / 4)),
        ]
    };
    for source in chains(4000) {
        // An answer or an error, and no overflow of the stack.
        drop(rendered(&source));
    }
    for source in chains(60_000) {
        let error = refused(&source);
        assert!(error.contains("more than"), "{error}");
    }
    assert!(refused(&"x".repeat(300 << 10)).contains("bytes"));
}

#[test]
fn what_templates_do_is_as_before() {
    for (source, expected) in [
        ("{{ 2 * 3 }} {{ 2.5 * 2 }} {{ true * 3 }} {{ -2 * 3 }} {{ 2 * 3 * 4 }}", "6 5.0 3 -6 24"),
        ("{{ 'ab' * 2 }}{{ 2 * 'c' }}{{ 'x' * -1 }}", "ababcc"),
        ("{{ [1] * 2 }}{{ ([1] + [2])[1:] }}{{ (1, 2) + (3,) }}{{ (1,) * 2 }}", "[1, 1][2](1, 2, 3)(1, 1)"),
        ("{% macro m(a, b=2) %}{{ a }}{{ b }}{% endmacro %}{{ m(1) }}{{ m(*[3, 4]) }}{{ m(**{'a': 5}) }}", "123452"),
        (
            "{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ loop.index }}{{ loop.last }}{% else %}no{% endfor %}",
            "1False3True",
        ),
        (
            "{% for i in [[1, [2]], [3]] recursive %}{% if i is sequence %}({{ loop(i) }}){% else %}{{ i }}{% endif %}{% endfor %}",
            "(1(2))(3)",
        ),
        ("{% set ns = namespace(a=1) %}{% for i in [1, 2] %}{% set ns.a = ns.a + i %}{% endfor %}{{ ns.a }}", "4"),
        ("{% if 1 == 2 %}a{% elif 'a' in ['a'] and 2 > 1 %}b{% else %}c{% endif %}{{ 'y' if none else 'z' }}", "bz"),
        ("{% set x %}a{{ text }}{% endset %}{{ x | upper }}{{ x[0] }}{{ text[1:3] }}", "A<A> Baa>"),
        ("{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}{{ v }}{% endfor %}{{ {'a': 1}.get('b', 7) }}", "a1b27"),
        (
            "{{ ['b', 'a'] | sort | join(', ') }}{{ [1, 2] | map('string') | list }}{{ range(3) | list }}",
            "a, b['1', '2'][0, 1, 2]",
        ),
        ("{% block a %}x{% endblock %}{{ self.a() }}", "xx"),
        ("{% call(v) m() %}{{ v }}{% endcall %}{% macro m() %}[{{ caller(3) }}]{% endmacro %}", ""),
        (
            "{{ '%s-%03d' | format('a', 7) }}{{ '{:>3}|{}'.format(1, 'b') }}{{ 'a.b' | replace('.', '') }}",
            "a-007  1|bab",
        ),
        (
            "{{ 'a b c'.rsplit(' ', 1) }}{{ ' a  b '.rsplit() }}{{ 'a-b-c'.rpartition('-')[2] }}{{ 'a'.center(4, '*') }}",
            "['a b', 'c']['a', 'b']c*a**",
        ),
        (
            "{{ 'abc'.removeprefix('a').removesuffix('c') }}{{ '-7'.zfill(4) }}{{ 'a'.ljust(2) }}{{ 'a'.rjust(2) }}|{{ 'aXa'.rindex('a') }}{{ 'aB'.swapcase() }}{{ [1, 2].index(2) }}",
            "b-007a  a|2Ab1",
        ),
    ] {
        match rendered(source) {
            Ok(text) => assert_eq!(text, expected, "{source}"),
            Err(error) => assert_eq!("", expected, "{source}: {error:?}"),
        }
    }
}
