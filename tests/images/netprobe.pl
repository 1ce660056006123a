#!/usr/bin/perl
# Small clients and servers for tests of networks.
#
#   netprobe udp-echo PORT NAME    answers each datagram with NAME and what it said
#   netprobe tcp-echo PORT NAME    answers each line with NAME and the line
#   netprobe udp HOST PORT TEXT [COUNT]    prints the answer; exit 1 without one. COUNT times, each
#                                          from a port of its own
#   netprobe tcp HOST PORT TEXT [COUNT]    the same
#   netprobe hold HOST PORT        one connection for ever: prints each answer to a counted line
#   netprobe sink PORT             reads what comes
#   netprobe source HOST PORT SECONDS    one connection as fast as it goes: prints bytes and seconds
#   netprobe dns TYPE NAME         prints the code and the records of an answer (A, SRV, PTR, CNAME)
use strict;
use warnings;
use IO::Socket::INET;
use Socket;

$| = 1;
my ($what, @args) = @ARGV;

if ($what eq 'udp-echo') {
    my ($port, $name) = @args;
    my $socket = IO::Socket::INET->new(LocalPort => $port, Proto => 'udp') or die "bind: $!";
    while (1) {
        my $peer = $socket->recv(my $text, 1024) // next;
        $socket->send("$name $text", 0, $peer);
    }
} elsif ($what eq 'tcp-echo') {
    my ($port, $name) = @args;
    $SIG{CHLD} = 'IGNORE';
    my $listener = IO::Socket::INET->new(LocalPort => $port, Listen => 64, ReuseAddr => 1) or die "bind: $!";
    while (1) {
        my $client = $listener->accept or next;
        if (fork == 0) {
            $client->autoflush(1);
            while (my $line = <$client>) {
                print $client "$name $line";
            }
            exit 0;
        }
        close $client;
    }
} elsif ($what eq 'udp') {
    my ($host, $port, $text, $count) = @args;
    for (1 .. $count // 1) {
        my $socket = IO::Socket::INET->new(PeerAddr => $host, PeerPort => $port, Proto => 'udp') or die "connect: $!";
        $socket->send($text) or die "send: $!";
        print answer($socket), "\n";
    }
} elsif ($what eq 'tcp') {
    my ($host, $port, $text, $count) = @args;
    for (1 .. $count // 1) {
        my $socket = IO::Socket::INET->new(PeerAddr => $host, PeerPort => $port, Timeout => 5) or die "connect: $!\n";
        $socket->autoflush(1);
        print $socket "$text\n";
        print answer($socket);
    }
} elsif ($what eq 'hold') {
    my ($host, $port) = @args;
    my $socket = IO::Socket::INET->new(PeerAddr => $host, PeerPort => $port, Timeout => 5) or die "connect: $!\n";
    $socket->autoflush(1);
    for (my $number = 1; ; $number++) {
        print $socket "$number\n";
        my $line = <$socket> // die "the connection ended\n";
        print $line;
        select undef, undef, undef, 0.3;
    }
} elsif ($what eq 'sink') {
    $SIG{CHLD} = 'IGNORE';
    my $listener = IO::Socket::INET->new(LocalPort => $args[0], Listen => 64, ReuseAddr => 1) or die "bind: $!";
    while (1) {
        my $client = $listener->accept or next;
        if (fork == 0) {
            1 while sysread $client, my $buffer, 262144;
            exit 0;
        }
        close $client;
    }
} elsif ($what eq 'source') {
    my ($host, $port, $seconds) = @args;
    my $socket = IO::Socket::INET->new(PeerAddr => $host, PeerPort => $port, Timeout => 5) or die "connect: $!\n";
    my ($block, $sum, $start) = ("x" x 262144, 0, clock());
    while (clock() - $start < $seconds) {
        for (1 .. 4) {
            $sum += syswrite($socket, $block) // die "write: $!\n";
        }
    }
    printf "%d %.3f\n", $sum, clock() - $start;
} elsif ($what eq 'dns') {
    dns(@args);
} else {
    die "netprobe: what?\n";
}

# Seconds, in fractions, without a module that perl-base has not.
sub clock {
    open my $file, '<', '/proc/uptime' or die "uptime: $!";
    return (split ' ', <$file>)[0];
}

sub answer {
    my $socket = shift;
    local $SIG{ALRM} = sub { die "no answer\n" };
    alarm 5;
    $socket->recv(my $text, 1024);
    alarm 0;
    die "no answer\n" unless length $text;
    return $text;
}

sub dns {
    my ($type, $name) = @_;
    my %types = (A => 1, CNAME => 5, SOA => 6, PTR => 12, SRV => 33);
    my %names = reverse %types;
    open my $file, '<', '/etc/resolv.conf' or die "resolv.conf: $!";
    my ($server) = map { /^nameserver\s+(\S+)/ ? $1 : () } <$file>;
    my $socket = IO::Socket::INET->new(PeerAddr => $server, PeerPort => 53, Proto => 'udp') or die "connect: $!";
    my $question = join('', map { pack 'C/a', $_ } split /\./, $name) . "\0" . pack('nn', $types{$type}, 1);
    $socket->send(pack('nnnnnn', $$ & 0xffff, 0x0100, 1, 0, 0, 0) . $question);
    my $message = answer($socket);
    my (undef, $flags, undef, $answers) = unpack 'nnnn', $message;
    my %codes = (0 => 'NOERROR', 2 => 'SERVFAIL', 3 => 'NXDOMAIN', 5 => 'REFUSED');
    print $codes{$flags & 15} // ($flags & 15), "\n";
    my $at = 12 + length $question;
    for (1 .. $answers) {
        my $owner;
        ($owner, $at) = domain($message, $at);
        my ($kind, undef, undef, $length) = unpack 'nnNn', substr $message, $at, 10;
        $at += 10;
        my $data = substr $message, $at, $length;
        my $text = $kind == 1 ? inet_ntoa($data)
            : $kind == 33 ? join(' ', (unpack 'nnn', $data)[2], (domain($message, $at + 6))[0])
            : $kind == 12 || $kind == 5 ? (domain($message, $at))[0]
            : '?';
        print +($names{$kind} // $kind), " $text\n";
        $at += $length;
    }
}

sub domain {
    my ($message, $at) = @_;
    my (@labels, $end);
    while (1) {
        my $length = ord substr $message, $at, 1;
        if (($length & 0xc0) == 0xc0) {
            $end //= $at + 2;
            $at = unpack('n', substr $message, $at, 2) & 0x3fff;
            next;
        }
        last unless $length;
        push @labels, substr $message, $at + 1, $length;
        $at += 1 + $length;
    }
    return (join('.', @labels), $end // $at + 1);
}
