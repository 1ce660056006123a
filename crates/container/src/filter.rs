//! One program for all system calls: a search tree over their numbers, with an answer at each leaf, or
//! for a call whose arguments matter a program of its own.
//!
//! The library compiles a list that is gone through from its beginning. When a filter is installed, the
//! kernel follows it for each call that there is, to know which are always allowed: two steps for each rule
//! before, the binary logarithm of the rules with a tree.
//!
//! Only the calls of the machine's own word size are filtered; a program that makes others (those of
//! 32 bits, or of x32) is killed, as with the engines' default filter.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompFilter, SeccompRule, TargetArch, sock_filter,
};

/// Rules for a call, of which one has to apply, or none for all of its calls; and what is done then.
pub(crate) type Table = BTreeMap<u32, (Vec<SeccompRule>, SeccompAction)>;

// linux/bpf_common.h, linux/seccomp.h, linux/audit.h
const LOAD: u16 = 0x20;
const JUMP: u16 = 0x05;
const JUMP_IF_EQUAL: u16 = 0x15;
const JUMP_IF_AT_LEAST: u16 = 0x35;
const RETURN: u16 = 0x06;
const OFFSET_OF_NUMBER: u32 = 0;
const OFFSET_OF_ARCHITECTURE: u32 = 4;
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
/// Most instructions that the kernel takes (`BPF_MAXINSNS`).
const MAX_INSTRUCTIONS: usize = 4096;
/// From here numbers are those of the x32 interface.
const X32: u32 = 0x4000_0000;
/// What a tracer makes of a call that is not to happen.
const NO_CALL: u32 = u32::MAX;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Leaf {
    Answer(u32),
    /// Number of the program.
    Program(usize),
}

/// What is done from a number on, until the next one.
type Leaves = Vec<(u32, Leaf)>;

/// The filter that does what `table` says, and `otherwise` with all other calls.
pub(crate) fn compile(table: Table, otherwise: &SeccompAction) -> Result<BpfProgram, BackendError> {
    let rest = Leaf::Answer(otherwise.clone().into());
    let mut leaves: Leaves = vec![(0, rest)];
    let mut programs = Vec::new();
    for (number, (rules, action)) in table {
        let leaf = if rules.is_empty() {
            Leaf::Answer(action.into())
        } else {
            let one = BTreeMap::from([(number.into(), rules)]);
            let filter = SeccompFilter::new(one, otherwise.clone(), action, TargetArch::x86_64)?;
            programs.push(BpfProgram::try_from(filter)?);
            Leaf::Program(programs.len() - 1)
        };
        from(&mut leaves, number, leaf);
        from(&mut leaves, number + 1, rest);
    }
    let kill = SeccompAction::KillProcess;
    from(&mut leaves, X32, Leaf::Answer(kill.clone().into()));
    from(&mut leaves, NO_CALL, rest);

    let mut filter = vec![
        step(LOAD, OFFSET_OF_ARCHITECTURE),
        branch(JUMP_IF_EQUAL, AUDIT_ARCH_X86_64, 1, 0),
        step(RETURN, kill.into()),
        step(LOAD, OFFSET_OF_NUMBER),
    ];
    let mut gates = Vec::new();
    for (instruction, program) in tree(&leaves) {
        gates.extend(program.map(|program| (filter.len(), program)));
        filter.push(instruction);
    }
    // All jumps in a program are forward and from where they are: it can stand anywhere.
    let starts: Vec<usize> = programs
        .into_iter()
        .map(|program| {
            let start = filter.len();
            filter.extend(program);
            start
        })
        .collect();
    if filter.len() > MAX_INSTRUCTIONS {
        return Err(BackendError::FilterTooLarge(filter.len()));
    }
    for (gate, program) in gates {
        filter[gate] = step(JUMP, distance(starts[program] - gate - 1));
    }
    Ok(filter)
}

/// Adds a leaf, which may begin where the last one does.
fn from(leaves: &mut Leaves, number: u32, leaf: Leaf) {
    leaves.pop_if(|(begin, _)| *begin == number);
    if leaves.last().is_none_or(|(_, last)| *last != leaf) {
        leaves.push((number, leaf));
    }
}

/// Instructions, and at leaves with a program, which: the jump to it is not known yet.
fn tree(leaves: &[(u32, Leaf)]) -> Vec<(sock_filter, Option<usize>)> {
    if let [(_, leaf)] = leaves {
        return vec![match *leaf {
            Leaf::Answer(answer) => (step(RETURN, answer), None),
            Leaf::Program(program) => (step(JUMP, 0), Some(program)),
        }];
    }
    let (low, high) = leaves.split_at(leaves.len() / 2);
    let middle = high.first().map_or(0, |(number, _)| *number);
    let (low, high) = (tree(low), tree(high));
    let mut all = match u8::try_from(low.len()) {
        Ok(over) => vec![(branch(JUMP_IF_AT_LEAST, middle, over, 0), None)],
        Err(_far) => vec![
            (branch(JUMP_IF_AT_LEAST, middle, 0, 1), None),
            (step(JUMP, distance(low.len())), None),
        ],
    };
    all.extend(low);
    all.extend(high);
    all
}

fn step(code: u16, k: u32) -> sock_filter {
    sock_filter {
        code,
        jt: 0,
        jf: 0,
        k,
    }
}

fn branch(code: u16, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

/// A filter is far shorter than this can hold.
fn distance(instructions: usize) -> u32 {
    u32::try_from(instructions).unwrap_or(u32::MAX)
}

#[cfg(test)]
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the filter's machine has words of 32 bits"
)]
pub(crate) mod tests {
    use proptest::prelude::*;
    use seccompiler::{SeccompCmpArgLen, SeccompCmpOp, SeccompCondition};

    use super::*;

    pub(crate) const ALLOW: u32 = 0x7fff_0000;
    pub(crate) const ERRNO: u32 = 0x0005_0000;
    pub(crate) const KILL: u32 = 0x8000_0000;

    /// What the kernel makes of a program, as far as compiled filters go, and in how many steps.
    pub(crate) fn follow(
        program: &[sock_filter],
        architecture: u32,
        call: u32,
        args: &[u64; 6],
    ) -> (u32, usize) {
        let word = |offset: u32| -> u32 {
            let bytes = |value: u64, high: bool| match high {
                true => (value >> 32) as u32,
                false => value as u32,
            };
            match offset {
                OFFSET_OF_NUMBER => call,
                OFFSET_OF_ARCHITECTURE => architecture,
                offset => {
                    let at = offset - 16;
                    bytes(args[(at / 8) as usize], at % 8 == 4)
                }
            }
        };
        let (mut pc, mut acc) = (0, 0u32);
        for steps in 1.. {
            let one = &program[pc];
            pc += 1;
            let jump = |taken: bool| usize::from(if taken { one.jt } else { one.jf });
            match one.code {
                LOAD => acc = word(one.k),
                JUMP_IF_EQUAL => pc += jump(acc == one.k),
                0x25 => pc += jump(acc > one.k),
                JUMP_IF_AT_LEAST => pc += jump(acc >= one.k),
                0x54 => acc &= one.k,
                JUMP => pc += one.k as usize,
                RETURN => return (one.k, steps),
                other => panic!("{other:#x}"),
            }
        }
        unreachable!()
    }

    pub(crate) fn run(program: &[sock_filter], call: i64, args: &[u64; 6]) -> u32 {
        follow(program, AUDIT_ARCH_X86_64, call as u32, args).0
    }

    fn equal(values: &[u64]) -> Vec<SeccompRule> {
        let one = |value: &u64| {
            let condition =
                SeccompCondition::new(1, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, *value);
            SeccompRule::new(vec![condition.unwrap()]).unwrap()
        };
        values.iter().map(one).collect()
    }

    proptest! {
        /// The library's own list for the same rules gives the same answers.
        #[test]
        fn a_tree_answers_like_a_list(
            rules in proptest::collection::btree_map(0u32..500, proptest::collection::vec(0u64..4, 0..3), 1..400),
        ) {
            let deny = SeccompAction::Errno(1);
            let list = rules.iter().map(|(call, values)| (i64::from(*call), equal(values))).collect();
            let list = SeccompFilter::new(list, SeccompAction::Allow, deny.clone(), TargetArch::x86_64);
            let table = rules.iter().map(|(call, values)| (*call, (equal(values), deny.clone()))).collect();
            match (BpfProgram::try_from(list.unwrap()), compile(table, &SeccompAction::Allow)) {
                (Ok(list), Ok(tree)) => {
                    for call in (0..600).chain([-1]) {
                        for value in 0..4 {
                            let args = [9, value, 9, 9, 9, 9];
                            prop_assert_eq!(run(&list, call, &args), run(&tree, call, &args), "{}", call);
                        }
                    }
                }
                (Err(_), Err(BackendError::FilterTooLarge(_))) => {}
                // The two are not of the same length.
                (list, tree) => {
                    let length = list.or(tree).unwrap().len();
                    prop_assert!(length > MAX_INSTRUCTIONS / 3, "{}", length);
                }
            }
        }
    }

    #[test]
    fn each_call_has_its_action_and_foreign_ones_are_killed() {
        let table = [
            (7, (Vec::new(), SeccompAction::Errno(1))),
            (8, (Vec::new(), SeccompAction::Errno(38))),
            (9, (equal(&[5]), SeccompAction::Errno(2))),
        ];
        let filter = compile(table.into(), &SeccompAction::Allow).unwrap();
        let answers: Vec<u32> = (6..=10).map(|call| run(&filter, call, &[0; 6])).collect();
        assert_eq!(answers, [ALLOW, ERRNO | 1, ERRNO | 38, ALLOW, ALLOW]);
        assert_eq!(run(&filter, 9, &[0, 5, 0, 0, 0, 0]), ERRNO | 2);
        assert_eq!(run(&filter, i64::from(X32) + 7, &[0; 6]), KILL);
        assert_eq!(run(&filter, i64::from(X32), &[0; 6]), KILL);
        assert_eq!(run(&filter, -2, &[0; 6]), KILL);
        assert_eq!(run(&filter, -1, &[0; 6]), ALLOW);
        const AUDIT_ARCH_I386: u32 = 0x4000_0003;
        assert_eq!(follow(&filter, AUDIT_ARCH_I386, 6, &[0; 6]).0, KILL);
    }

    #[test]
    fn a_call_is_found_in_a_few_steps() {
        let table = (0..450)
            .step_by(2)
            .map(|call| (call, (Vec::new(), SeccompAction::Errno(1))));
        let filter = compile(table.collect(), &SeccompAction::Allow).unwrap();
        for call in 0..460 {
            let (answer, steps) = follow(&filter, AUDIT_ARCH_X86_64, call, &[0; 6]);
            assert_eq!(answer == ALLOW, call % 2 == 1 || call >= 450);
            assert!(steps <= 16, "{call}: {steps}");
        }
    }

    #[test]
    fn what_the_kernel_would_not_take_is_refused() {
        let table = (0..2000).map(|call| (call, (equal(&[1, 2]), SeccompAction::Errno(1))));
        assert!(matches!(
            compile(table.collect(), &SeccompAction::Allow),
            Err(BackendError::FilterTooLarge(_))
        ));
    }
}
