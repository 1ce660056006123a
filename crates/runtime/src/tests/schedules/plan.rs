//! What a schedule is made of, and how one is drawn.

use std::io::ErrorKind;

use hypernetes_agent_api::fake::Method;
use proptest::{collection::vec, prelude::*, sample::select};

use crate::testing::Place;

pub(super) const PODS: u8 = 3;
pub(super) const CONTAINERS: u8 = 2;

/// What a caller asks, or what the program in a container does.
#[derive(Debug, Clone)]
pub(super) enum Op {
    Run,
    Create(u8),
    Start(u8),
    Exec(u8),
    Attach(u8),
    /// The program writes so many lines.
    Write(u8, u8),
    /// The program ends with this code.
    Exit(u8, u8),
    Pause(u8, bool),
    Update(u8),
    /// The log is renamed and a new one asked for.
    Rotate(u8),
    /// Politely, or at once.
    Stop(u8, bool),
    Remove(u8),
    Resize(bool),
    /// A volume with a disk of its own.
    LimitedVolume(u8),
    /// A volume that outlives the pod.
    KeptVolume,
    FilesVolume,
    Device,
    Stats,
    PullImage,
    RemoveImage,
    Suspend,
    Resume,
    StopSandbox,
    RemoveSandbox,
}

/// What goes wrong at some effect.
#[derive(Debug, Clone)]
pub(super) enum Fault {
    /// The VMM of a pod's VM dies, or its kernel panics.
    VmEnds { pod: u8, panic: bool },
    /// The agent is another one that knows nothing.
    AgentForgets { pod: u8 },
    /// The session breaks.
    Disconnects { pod: u8 },
    /// From here to the end of this life.
    Agent {
        pod: u8,
        method: Method,
        how: Answer,
    },
    /// The guest speaks of what is not so.
    Lies { pod: u8, container: u8, known: bool },
    /// The next so many effects there fail, before or after they are done.
    Fails {
        place: Place,
        count: u8,
        done: bool,
        kind: ErrorKind,
    },
    /// The next so many effects there take so many milliseconds.
    Slow { place: Place, count: u8, ms: u8 },
    /// The disk of a container's log is full, to the end of this life.
    LogIsFull { pod: u8, container: u8 },
    /// The wall clock jumps by so many seconds.
    ClockJumps(i32),
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Answer {
    Fails,
    Stalls,
    Oversized,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum End {
    /// When all that was asked is answered.
    Orderly,
    /// Killed at this effect.
    AtEffect(u16),
    /// Killed after so many milliseconds.
    After(u8),
    /// The same, and every VM with it; what was not synced to disk is torn.
    PowerFailure(u16, u64),
}

/// One life of the runtime.
#[derive(Debug, Clone)]
pub(super) struct Life {
    /// By pod; each pod's caller asks one thing after the other.
    pub(super) ops: Vec<(u8, Op)>,
    /// By effect.
    pub(super) faults: Vec<(u16, Fault)>,
    pub(super) end: End,
    /// Afterwards a runtime without faults is looked at, before the next life.
    pub(super) look: bool,
}

pub(super) fn schedule() -> impl Strategy<Value = Vec<Life>> {
    vec(life(), 1..5)
}

fn life() -> impl Strategy<Value = Life> {
    // Some pods come up first, or much of what follows would find nothing.
    let begun = vec((0..PODS, 0..CONTAINERS), 0..4);
    let begun = begun.prop_map(|pods| {
        let begin = |(pod, c)| [Op::Run, Op::Create(c), Op::Start(c)].map(|op| (pod, op));
        pods.into_iter().flat_map(begin).collect::<Vec<_>>()
    });
    let ops = (begun, vec((0..PODS, op()), 1..25)).prop_map(|(begun, ops)| [begun, ops].concat());
    let faults = vec((0u16..250, fault()), 0..6);
    (ops, faults, end(), any::<bool>()).prop_map(|(ops, faults, end, look)| Life {
        ops,
        faults,
        end,
        look,
    })
}

fn end() -> impl Strategy<Value = End> {
    prop_oneof![
        1 => Just(End::Orderly),
        6 => (0u16..300).prop_map(End::AtEffect),
        2 => (0u8..120).prop_map(End::After),
        2 => (0u16..300, any::<u64>()).prop_map(|(effect, seed)| End::PowerFailure(effect, seed)),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let c = || 0..CONTAINERS;
    prop_oneof![
        4 => Just(Op::Run),
        5 => c().prop_map(Op::Create),
        5 => c().prop_map(Op::Start),
        3 => c().prop_map(Op::Exec),
        2 => c().prop_map(Op::Attach),
        6 => (c(), 1u8..9).prop_map(|(c, lines)| Op::Write(c, lines)),
        3 => (c(), 0u8..5).prop_map(|(c, code)| Op::Exit(c, code)),
        2 => (c(), any::<bool>()).prop_map(|(c, paused)| Op::Pause(c, paused)),
        3 => c().prop_map(Op::Update),
        3 => c().prop_map(Op::Rotate),
        3 => (c(), any::<bool>()).prop_map(|(c, politely)| Op::Stop(c, politely)),
        4 => c().prop_map(Op::Remove),
        1 => any::<bool>().prop_map(Op::Resize),
        2 => (0u8..2).prop_map(Op::LimitedVolume),
        2 => Just(Op::KeptVolume),
        1 => Just(Op::FilesVolume),
        1 => Just(Op::Device),
        1 => Just(Op::Stats),
        1 => Just(Op::PullImage),
        1 => Just(Op::RemoveImage),
        3 => Just(Op::Suspend),
        4 => Just(Op::Resume),
        2 => Just(Op::StopSandbox),
        3 => Just(Op::RemoveSandbox),
    ]
}

fn place() -> impl Strategy<Value = Place> {
    select(vec![
        Place::Records,
        Place::Records,
        Place::Files,
        Place::Network,
        Place::Vmm,
        Place::Volumes,
    ])
}

/// What a guest is asked, and may answer wrongly.
pub(super) const METHODS: [Method; 14] = [
    Method::Hello,
    Method::ConfigureSandbox,
    Method::WriteVolume,
    Method::CreateContainer,
    Method::StartContainer,
    Method::UpdateContainer,
    Method::Pause,
    Method::Signal,
    Method::RemoveContainer,
    Method::ListContainers,
    Method::Events,
    Method::Output,
    Method::Exec,
    Method::Shutdown,
];

fn fault() -> impl Strategy<Value = Fault> {
    let pod = || 0..PODS;
    let answer = select(vec![Answer::Fails, Answer::Stalls, Answer::Oversized]);
    let kind = select(vec![
        ErrorKind::StorageFull,
        ErrorKind::Other,
        ErrorKind::OutOfMemory,
    ]);
    prop_oneof![
        2 => (pod(), any::<bool>()).prop_map(|(pod, panic)| Fault::VmEnds { pod, panic }),
        1 => pod().prop_map(|pod| Fault::AgentForgets { pod }),
        2 => pod().prop_map(|pod| Fault::Disconnects { pod }),
        4 => (pod(), select(METHODS.to_vec()), answer)
            .prop_map(|(pod, method, how)| Fault::Agent { pod, method, how }),
        1 => (pod(), 0..CONTAINERS, any::<bool>())
            .prop_map(|(pod, container, known)| Fault::Lies { pod, container, known }),
        6 => (place(), 1u8..5, any::<bool>(), kind)
            .prop_map(|(place, count, done, kind)| Fault::Fails { place, count, done, kind }),
        2 => (place(), 1u8..5, 1u8..60)
            .prop_map(|(place, count, ms)| Fault::Slow { place, count, ms }),
        1 => (pod(), 0..CONTAINERS)
            .prop_map(|(pod, container)| Fault::LogIsFull { pod, container }),
        1 => (-100_000i32..100_000).prop_map(Fault::ClockJumps),
    ]
}
