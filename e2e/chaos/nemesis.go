package chaos

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sort"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
)

// Nemesis breaks a cluster. What it breaks it draws from a seed; what it has
// broken it mends again.
type Nemesis struct {
	c      *Cluster
	volume string
	rng    *rand.Rand
	table  map[string]*Count
}

// Count is how often a fault was used, and the worst that came of it.
type Count struct {
	Times  int
	Served time.Duration // until an operation begun after it succeeded
	Stall  time.Duration // without any success, while it lasted
	Green  time.Duration // until health was green after it was mended
}

// NewNemesis makes the enemy of a cluster and of the owner of a volume.
func NewNemesis(c *Cluster, volume string, seed uint64) *Nemesis {
	return &Nemesis{c: c, volume: volume, rng: rand.New(rand.NewPCG(seed, 1)), table: map[string]*Count{}}
}

// Fault is something broken: what it is, and how to mend it.
type Fault struct {
	Name string
	What string // whom it hit
	Mend func(ctx context.Context) error
}

// Faults are the names of all faults.
func Faults() []string {
	out := make([]string, 0, len(faults))
	for name := range faults {
		out = append(out, name)
	}
	sort.Strings(out)
	return out
}

// faults break things. Each returns whom it hit and how to mend it.
var faults = map[string]func(n *Nemesis, ctx context.Context) (what string, mend func(context.Context) error, err error){
	"kill a server":       (*Nemesis).killOther,
	"kill the owner":      (*Nemesis).killOwner,
	"kill etcd's leader":  (*Nemesis).killLeader,
	"kill all":            (*Nemesis).killAll,
	"pause a server":      (*Nemesis).pauseAny,
	"pause the owner":     (*Nemesis).pauseOwner,
	"pause etcd's leader": (*Nemesis).pauseLeader,
	"cut off a minority":  (*Nemesis).minority,
	"cut a server off":    (*Nemesis).island,
	"cut in two":          (*Nemesis).split,
	"cut one way":         (*Nemesis).oneWay,
	"flip bits":           (*Nemesis).flip,
	"fill a disk":         (*Nemesis).fill,
	"slow disk":           (*Nemesis).slow,
	"failing disk":        (*Nemesis).failing,
	"restart a server":    (*Nemesis).restart,
}

// Begin breaks something.
func (n *Nemesis) Begin(ctx context.Context, name string) (Fault, error) {
	do := faults[name]
	if do == nil {
		return Fault{}, fmt.Errorf("fault %q: want one of %s", name, strings.Join(Faults(), ", "))
	}
	what, mend, err := do(n, ctx)
	if err != nil {
		return Fault{}, fmt.Errorf("%s: %w", name, err)
	}
	if n.table[name] == nil {
		n.table[name] = &Count{}
	}
	n.table[name].Times++
	return Fault{Name: name, What: what, Mend: mend}, nil
}

// Draw picks a fault.
func (n *Nemesis) Draw() string {
	all := Faults()
	return all[n.rng.IntN(len(all))]
}

// Note keeps what came of a fault.
func (n *Nemesis) Note(f Fault, served, stall, green time.Duration) {
	c := n.table[f.Name]
	c.Served, c.Stall, c.Green = max(c.Served, served), max(c.Stall, stall), max(c.Green, green)
}

// Table shows the faults, how often they were used, and the worst that came of
// each.
func (n *Nemesis) Table() string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "times\tserved after\tlongest stall\tgreen after\t  fault\t")
	for _, name := range Faults() {
		if c := n.table[name]; c != nil {
			fmt.Fprintf(w, "%d\t%v\t%v\t%v\t  %s\t\n", c.Times, c.Served.Round(time.Millisecond), c.Stall.Round(time.Millisecond), c.Green.Round(time.Millisecond), name)
		}
	}
	w.Flush()
	return b.String()
}

func (n *Nemesis) any(of []*Server) *Server { return of[n.rng.IntN(len(of))] }

func (n *Nemesis) startAll(ctx context.Context) error { return n.c.StartAll(ctx) }

// heal mends all links.
func (n *Nemesis) heal(context.Context) error { return n.c.World.Heal() }

// kill ends a server until it is mended.
func (n *Nemesis) kill(s *Server, err error) (string, func(context.Context) error, error) {
	if err != nil {
		return "", nil, err
	}
	s.Kill()
	return "SIGKILL of " + s.Name, n.startAll, nil
}

func (n *Nemesis) killOther(ctx context.Context) (string, func(context.Context) error, error) {
	owner, err := n.c.Owner(ctx, n.volume)
	if err != nil {
		return n.kill(n.any(n.c.Servers), nil) // nobody owns it now
	}
	return n.kill(n.any(n.c.Others(owner)), nil)
}

func (n *Nemesis) killOwner(ctx context.Context) (string, func(context.Context) error, error) {
	return n.kill(n.c.Owner(ctx, n.volume))
}

func (n *Nemesis) killLeader(ctx context.Context) (string, func(context.Context) error, error) {
	return n.kill(n.c.EtcdLeader(ctx))
}

func (n *Nemesis) killAll(ctx context.Context) (string, func(context.Context) error, error) {
	n.c.KillAll()
	begun := time.Now()
	if err := n.c.StartAll(ctx); err != nil {
		return "", nil, err
	}
	return fmt.Sprintf("SIGKILL of all, restarted in %v", time.Since(begun).Round(time.Millisecond)), n.startAll, nil
}

// halt stops a server without its notice.
func (n *Nemesis) halt(s *Server, err error) (string, func(context.Context) error, error) {
	if err != nil {
		return "", nil, err
	}
	s.Signal(syscall.SIGSTOP)
	return "SIGSTOP of " + s.Name, func(context.Context) error {
		s.Signal(syscall.SIGCONT)
		return nil
	}, nil
}

func (n *Nemesis) pauseAny(context.Context) (string, func(context.Context) error, error) {
	return n.halt(n.any(n.c.Servers), nil)
}

func (n *Nemesis) pauseOwner(ctx context.Context) (string, func(context.Context) error, error) {
	return n.halt(n.c.Owner(ctx, n.volume))
}

func (n *Nemesis) pauseLeader(ctx context.Context) (string, func(context.Context) error, error) {
	return n.halt(n.c.EtcdLeader(ctx))
}

// minority cuts etcd's leader off from the other servers, and the owner with it
// unless both together would be the majority: then the owner alone. Clients
// reach all.
func (n *Nemesis) minority(ctx context.Context) (string, func(context.Context) error, error) {
	leader, err := n.c.EtcdLeader(ctx)
	if err != nil {
		return "", nil, err
	}
	owner, err := n.c.Owner(ctx, n.volume)
	if err != nil {
		return "", nil, err
	}
	few := []*Server{leader}
	switch {
	case owner == leader:
	case owner.Controller:
		few = []*Server{owner}
	default:
		few = append(few, owner)
	}
	what := fmt.Sprintf("%s cut off from the others; etcd's leader is %s, the owner %s", names(few), leader.Name, owner.Name)
	return what, n.heal, n.c.World.Partition(Hosts(few...), Hosts(n.c.Others(few...)...))
}

// island cuts a server off from all, clients too.
func (n *Nemesis) island(context.Context) (string, func(context.Context) error, error) {
	s := n.any(n.c.Servers)
	all := append(Hosts(n.c.Others(s)...), n.c.Clients)
	return s.Name + " cut off from all", n.heal, n.c.World.Partition(Hosts(s), all)
}

// split cuts the servers into two groups of any sizes.
func (n *Nemesis) split(context.Context) (string, func(context.Context) error, error) {
	order := n.rng.Perm(len(n.c.Servers))
	var a []*Server
	for _, i := range order[:1+n.rng.IntN(len(order)-1)] {
		a = append(a, n.c.Servers[i])
	}
	b := n.c.Others(a...)
	return names(a) + " cut off from " + names(b), n.heal, n.c.World.Partition(Hosts(a...), Hosts(b...))
}

// oneWay drops what two servers send to a third, or what that sends to them.
func (n *Nemesis) oneWay(ctx context.Context) (string, func(context.Context) error, error) {
	one, err := n.c.Owner(ctx, n.volume)
	if err != nil {
		one = n.any(n.c.Servers)
	}
	others := n.c.Others(one)
	order := n.rng.Perm(len(others))
	two := []*Server{others[order[0]], others[order[1]]}
	to, from := []*Server{one}, two
	if n.rng.IntN(2) == 0 {
		to, from = from, to
	}
	var errs []error
	for _, x := range from {
		for _, y := range to {
			errs = append(errs, n.c.World.Cut(x.Host, y.Host))
		}
	}
	return fmt.Sprintf("%s does not hear %s, the other way it works", names(to), names(from)), n.heal, errors.Join(errs...)
}

// flip changes bits on one disk; a check finds and mends them.
func (n *Nemesis) flip(context.Context) (string, func(context.Context) error, error) {
	s := n.any(n.c.Servers)
	hit, err := s.Flip(n.rng, 30)
	if err != nil {
		return "", nil, err
	}
	return fmt.Sprintf("flipped a bit in %d blocks of %s", hit, s.Name), func(ctx context.Context) error {
		return n.c.Check(ctx, n.any(n.c.Servers))
	}, nil
}

// fill leaves no room on one disk.
func (n *Nemesis) fill(context.Context) (string, func(context.Context) error, error) {
	s := n.any(n.c.Servers)
	return "no byte free on " + s.Name, func(context.Context) error { return s.Empty() }, s.Fill()
}

func (n *Nemesis) slow(ctx context.Context) (string, func(context.Context) error, error) {
	delay := []string{"20ms", "200ms", "2s"}[n.rng.IntN(3)]
	return n.inject(ctx, "slow", "--delay", delay)
}

func (n *Nemesis) failing(ctx context.Context) (string, func(context.Context) error, error) {
	return n.inject(ctx, "fail")
}

// inject uses the program's own way to spoil a disk.
func (n *Nemesis) inject(ctx context.Context, verb string, flags ...string) (string, func(context.Context) error, error) {
	s := n.any(n.c.Servers)
	nodes, err := n.c.Nodes(ctx, s)
	if err != nil {
		return "", nil, err
	}
	id := ""
	for _, k := range nodes {
		if k.Path == s.Disk {
			id = strconv.Itoa(k.ID)
		}
	}
	says, err := s.Atoll(ctx, append([]string{"demo", verb, id}, flags...)...)
	return s.Name + ": " + strings.TrimSpace(says), func(ctx context.Context) error {
		_, err := Eventually(ctx, time.Minute, "node "+id+" is well", func(ctx context.Context) error {
			_, err := s.Atoll(ctx, "demo", "revive", id)
			return err
		})
		return err
	}, err
}

// restart stops a server cleanly and starts it again.
func (n *Nemesis) restart(context.Context) (string, func(context.Context) error, error) {
	s := n.any(n.c.Servers)
	return s.Name + " restarted", n.startAll, s.Stop()
}

func names(servers []*Server) string {
	out := make([]string, len(servers))
	for i, s := range servers {
		out[i] = s.Name
	}
	return strings.Join(out, " ")
}
