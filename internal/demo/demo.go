// Package demo is "atoll demo": a throw-away cluster of five nodes in one
// process, to look at, to use and to break; and a tour that does the main job on
// real data by itself and sums up what it saw.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/server"
)

// Options describe a demo.
type Options struct {
	Dir     string // kept unless Remove is set
	Nodes   int
	Remove  bool   // delete Dir at the end
	Script  string // "tour" plays it and ends; empty runs until the context ends
	Limit   string // bytes that each node may use, as in "10G"
	Source  string // directory of which the tour makes its image; empty = Go's sources
	Listen  string
	NBD     string
	Version string
	Out     io.Writer
	Err     io.Writer
	TTY     bool // Out is a terminal
	Log     *slog.Logger
}

// Run starts the demo and returns when it ended, stopped cleanly.
func Run(ctx context.Context, o Options) (err error) {
	if o.Nodes < 1 || o.Nodes > 16 {
		return fmt.Errorf("demo with %d nodes: want 1 to 16: %w", o.Nodes, atoll.ErrInvalid)
	}
	if o.Script != "" && o.Script != "tour" {
		return fmt.Errorf("demo script %q: want tour: %w", o.Script, atoll.ErrInvalid)
	}
	dir, err := prepareDir(&o)
	if err != nil {
		return err
	}
	if o.Remove {
		defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	}
	cfg, err := server.DemoConfig(dir, o.Nodes, o.Listen, o.NBD, o.Limit)
	if err != nil {
		return err
	}
	start := time.Now()
	srv, err := server.Start(ctx, cfg, server.Options{Log: o.Log, Version: o.Version, Demo: true})
	if err != nil {
		return err
	}
	defer func() {
		serr := srv.Stop()
		err = errors.Join(err, serr)
		if serr == nil && o.Script == "" {
			again := "start again with: atoll demo"
			if o.Remove {
				again = "its data are removed"
			}
			fmt.Fprintln(o.Out, "stopped cleanly; "+again)
		}
	}()
	banner(&o, dir, srv, time.Since(start))
	client, err := api.NewClient("unix:"+srv.Socket(), api.Credential{}, nil)
	if err != nil {
		return err
	}
	defer client.Close()
	if o.Script == "tour" {
		return tour(ctx, &o, dir, client)
	}
	select {
	case <-ctx.Done():
		return nil
	case err := <-srv.Failed():
		return err
	}
}

// prepareDir makes the directory; an existing one must be a demo's.
func prepareDir(o *Options) (string, error) {
	dir := o.Dir
	if dir == "" && o.Script != "" && o.Remove {
		tmp, err := os.MkdirTemp(".", "atoll-demo-")
		if err != nil {
			return "", fmt.Errorf("make demo directory: %v: %w", err, atoll.ErrInvalid)
		}
		return filepath.Abs(tmp)
	}
	if dir == "" {
		dir = "atoll-demo"
	}
	abs, err := filepath.Abs(dir)
	if err != nil {
		return "", fmt.Errorf("demo directory: %w", err)
	}
	entries, err := os.ReadDir(abs)
	if err == nil && len(entries) > 0 {
		if _, serr := os.Stat(filepath.Join(abs, "demo")); serr != nil {
			return "", fmt.Errorf("demo directory %s is not empty and not a demo's; choose another with --dir: %w", abs, atoll.ErrExist)
		}
	}
	if err := os.MkdirAll(abs, 0o700); err != nil {
		return "", fmt.Errorf("make demo directory: %v: %w", err, atoll.ErrInvalid)
	}
	return abs, os.WriteFile(filepath.Join(abs, "demo"), []byte("This directory belongs to atoll demo.\n"), 0o600)
}

// banner tells what runs where.
func banner(o *Options, dir string, srv *server.Server, took time.Duration) {
	kept := "kept; --rm forgets them"
	if o.Remove {
		kept = "removed at the end"
	}
	if wd, err := os.Getwd(); err == nil {
		if rel, err := filepath.Rel(wd, dir); err == nil {
			dir = "./" + rel
		}
	}
	stage := srv.Took()
	fmt.Fprintf(o.Out, "  catalog  ready  %4.1f s   etcd, 1 member\n", stage.Catalog.Seconds())
	fmt.Fprintf(o.Out, "  nodes    ready  %4.1f s   %d × %s in %s (%s)\n", stage.Nodes.Seconds(), o.Nodes, o.Limit, dir, kept)
	socket := filepath.Join(dir, "nbd.sock")
	if srv.NBDAddr() != "" {
		socket = "nbd://" + srv.NBDAddr() + " and " + socket
	}
	fmt.Fprintf(o.Out, "  nbd      ready          %s\n", socket)
	fmt.Fprintf(o.Out, "  api      ready          http://%s and %s\n", srv.APIAddr(), srv.Socket())
	fmt.Fprintf(o.Out, "  All ready %.1f s after the start; all listen on this machine only.\n", took.Seconds())
	if o.Script == "" {
		fmt.Fprintln(o.Out, "  Next, in another terminal: atoll volume create disk1 10G")
		fmt.Fprintln(o.Out, "  Break it: atoll demo kill|pause|slow|corrupt|fill NODE; mend it: atoll demo revive NODE")
		fmt.Fprintln(o.Out, "  Stop with Ctrl-C.")
	}
}
