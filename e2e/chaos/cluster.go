package chaos

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Cluster is some servers, and the host of their clients.
type Cluster struct {
	World   *World
	Servers []*Server
	Clients *Host
	keys    *keys
	log     *slog.Logger
}

// Options say how large a cluster is.
type Options struct {
	Servers     int // each on a host of its own, with a storage node and a gateway
	Controllers int // of them, the first ones
	Log         *slog.Logger
}

// NewCluster makes hosts and servers and joins them to one cluster.
func NewCluster(ctx context.Context, w *World, o Options) (*Cluster, error) {
	c := &Cluster{World: w, log: o.Log}
	var err error
	if c.keys, err = newKeys(w.path("keys")); err != nil {
		return nil, err
	}
	for i := range o.Servers {
		if err := c.join(ctx, fmt.Sprintf("s%d", i+1), i < o.Controllers); err != nil {
			return c, err
		}
	}
	c.Clients, err = w.AddHost("clients")
	return c, err
}

// join makes a host and starts a server on it.
func (c *Cluster) join(ctx context.Context, name string, controller bool) error {
	h, err := c.World.AddHost(name)
	if err != nil {
		return err
	}
	s := &Server{Host: h, Controller: controller, dir: c.World.path(name)}
	s.Disk = filepath.Join(s.dir, "disk")
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return fmt.Errorf("make server %s: %w", name, err)
	}
	if !c.World.onDisk {
		if err := mountDisk(s.Disk); err != nil {
			return fmt.Errorf("make server %s: %w", name, err)
		}
	}
	logs := s.dir
	if dir := os.Getenv("CHAOS_LOGS"); dir != "" {
		logs = dir
	}
	f, err := os.Create(filepath.Join(logs, name+".log"))
	if err != nil {
		return fmt.Errorf("make server %s: %w", name, err)
	}
	s.log = &logFile{f: f}
	roles := "node,gateway"
	if controller {
		roles = "controller,node,gateway"
	}
	s.args = []string{"server", "--data", filepath.Join(s.dir, "d"), "--disk", s.Disk, "--roles", roles, "--host", name,
		"--listen", s.API(), "--nbd", h.Addr + ":" + nbdPort, "--spare", "0", "--memory", "256M", "--log-level", logLevel()}
	s.args = append(s.args, c.keys.serverFlags()...)
	if len(c.Servers) > 0 {
		first := c.Servers[0]
		token, err := first.Atoll(ctx, "token", "create", "-q")
		if err != nil {
			return err
		}
		s.joining = []string{"--join", first.API(), "--token", strings.TrimSpace(token)}
	}
	begun := time.Now()
	if err := s.Start(ctx); err != nil {
		return err
	}
	s.joining = nil
	c.Servers = append(c.Servers, s)
	c.log.Info("server joined", "server", name, "controller", controller, "took", time.Since(begun))
	return nil
}

// askTime is how long a server may take to answer a question. One that is cut
// off does not.
const askTime = 10 * time.Second

// Node is a storage node as the command line shows it.
type Node struct {
	ID              int
	Up              bool
	Condition, Path string
	Process         string // that serves it
	Segments        int
	OpenSegments    int
}

// Nodes lists the storage nodes as server s sees them.
func (c *Cluster) Nodes(ctx context.Context, s *Server) ([]Node, error) {
	var out struct{ Nodes []Node }
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	err := s.Ask(ctx, &out, "node", "ls")
	return out.Nodes, err
}

// Volume is a volume as the command line shows it.
type Volume struct {
	Name, ServedBy          string
	Replicas, ShortSegments int
	Epoch                   int64
	Open                    bool
}

// Volume asks server s about a volume.
func (c *Cluster) Volume(ctx context.Context, s *Server, name string) (v Volume, err error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	return v, s.Ask(ctx, &v, "volume", "info", name)
}

// Owner finds the server that has the volume open.
func (c *Cluster) Owner(ctx context.Context, name string) (*Server, error) {
	var errs []error
	for _, ask := range c.Servers {
		v, err := c.Volume(ctx, ask, name)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		for _, s := range c.Servers {
			if at, err := c.Nodes(ctx, s); err == nil && v.ServedBy != "" && processOf(at, s.Disk) == v.ServedBy {
				return s, nil
			}
		}
		errs = append(errs, fmt.Errorf("server %s says that %s is served by %q", ask.Name, name, v.ServedBy))
	}
	return nil, fmt.Errorf("find the owner of %s: %w", name, errors.Join(errs...))
}

// processOf finds the process that serves a disk, among nodes as that process
// lists them.
func processOf(nodes []Node, disk string) string {
	for _, n := range nodes {
		if n.Path == disk {
			return n.Process
		}
	}
	return ""
}

// Others are the servers that are not among some.
func (c *Cluster) Others(not ...*Server) []*Server {
	var out []*Server
next:
	for _, s := range c.Servers {
		for _, n := range not {
			if s == n {
				continue next
			}
		}
		out = append(out, s)
	}
	return out
}

// Hosts are the hosts of servers.
func Hosts(servers ...*Server) []*Host {
	out := make([]*Host, len(servers))
	for i, s := range servers {
		out[i] = s.Host
	}
	return out
}

// URI is a volume's address at a server.
func (c *Cluster) URI(s *Server, volume string) string {
	return fmt.Sprintf("nbds://%s:%s/%s", s.Addr, nbdPort, volume)
}

// pause waits; an error if ctx ends before.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Eventually repeats ok until it returns nil, and returns how long that took or
// the last error.
func Eventually(ctx context.Context, within time.Duration, what string, ok func(context.Context) error) (time.Duration, error) {
	begun := time.Now()
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	var last error
	for {
		err := ok(ctx)
		if err == nil {
			return time.Since(begun), nil
		}
		if last == nil || ctx.Err() == nil {
			last = err
		}
		if pause(ctx, 100*time.Millisecond) != nil {
			return time.Since(begun), fmt.Errorf("not within %v: %s: %w", within, what, last)
		}
	}
}

// Healthy waits until every server sees every node up and the cluster whole.
func (c *Cluster) Healthy(ctx context.Context, within time.Duration) (time.Duration, error) {
	return Eventually(ctx, within, "health green at every server", func(ctx context.Context) error {
		for _, s := range c.Servers {
			nodes, err := c.Nodes(ctx, s)
			if err != nil {
				return err
			}
			up := 0
			for _, n := range nodes {
				if n.Up && n.Condition == "up" {
					up++
				}
			}
			text, err := s.Atoll(ctx, "status")
			if err != nil {
				return err
			}
			if up != len(c.Servers) || !strings.HasPrefix(text, "HEALTHY") {
				return fmt.Errorf("server %s sees %d of %d nodes up:\n%s%v", s.Name, up, len(c.Servers), text, nodes)
			}
		}
		return nil
	})
}

// Whole waits until no segment of the volumes lacks a copy.
func (c *Cluster) Whole(ctx context.Context, within time.Duration, volumes ...string) (time.Duration, error) {
	return Eventually(ctx, within, "every segment has all its copies", func(ctx context.Context) error {
		for _, name := range volumes {
			v, err := c.Volume(ctx, c.Servers[0], name)
			if err != nil {
				return err
			}
			if v.ShortSegments != 0 {
				return fmt.Errorf("volume %s has %d segments with too few copies", name, v.ShortSegments)
			}
		}
		return nil
	})
}

// Check proves all volumes consistent by reading every copy, through server s,
// and mends what is damaged. Nodes that do not answer are given some time.
func (c *Cluster) Check(ctx context.Context, s *Server) error {
	begun := time.Now()
	for {
		text, err := s.Atoll(ctx, "check", "--read")
		var exit *Exit
		if err == nil {
			c.log.Info("checked", "by", s.Name, "says", strings.Join(strings.Fields(text), " "))
			return nil
		}
		if !errors.As(err, &exit) || exit.Code != 7 && exit.Code != 6 || time.Since(begun) > time.Minute {
			return err
		}
		if pause(ctx, time.Second) != nil {
			return err
		}
	}
}

// Stop ends every server cleanly.
func (c *Cluster) Stop() error {
	errs := make(chan error, len(c.Servers))
	for _, s := range c.Servers {
		go func() { errs <- s.Stop() }()
	}
	var all []error
	for range c.Servers {
		all = append(all, <-errs)
	}
	return errors.Join(all...)
}

// Logs writes the ends of all servers' logs.
func (c *Cluster) Logs(w io.Writer, lines int) {
	for _, s := range c.Servers {
		fmt.Fprintf(w, "── log of server %s\n%s\n", s.Name, s.Tail(lines))
	}
}

// logLevel is what the servers log.
func logLevel() string {
	if l := os.Getenv("CHAOS_LOG_LEVEL"); l != "" {
		return l
	}
	return "info"
}
