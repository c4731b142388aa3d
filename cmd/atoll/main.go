// Command atoll is the one binary of Atoll: it runs servers and talks to them.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"syscall"

	"github.com/atollstore/atoll/internal/cli"
	"github.com/atollstore/atoll/internal/server"
)

// version is set by the linker.
var version = ""

func main() {
	os.Exit(run())
}

// run returns the exit code. A panic becomes a message and a code of its own.
func run() (code int) {
	if runtime.GOMAXPROCS(0) < server.Procs() && os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(server.Procs())
	}
	defer func() {
		if r := recover(); r != nil {
			fmt.Fprintf(os.Stderr, "atoll: internal error: %v\n%s\nPlease report this with the lines above.\n", r, debug.Stack())
			code = cli.ExitOther
		}
	}()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	app := &cli.App{In: os.Stdin, Out: os.Stdout, Err: os.Stderr}
	root := cli.New(app, buildVersion())
	root.AddCommand(serverCommand(), demoCommand(app), app.CheckCommand(checkOffline))
	if filepath.Base(os.Args[0]) == "rbd" {
		return cli.RunRBD(ctx, app, root, os.Args[1:])
	}
	if name, ok := cli.CurveName(os.Args[0]); ok {
		return cli.RunCurve(ctx, app, root, name, os.Args[1:])
	}
	return cli.Run(ctx, app, root, os.Args[1:])
}

// buildVersion is the linker's version, or what Go recorded of the checkout.
func buildVersion() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" && info.Main.Version != "(devel)" {
		return info.Main.Version
	}
	return "dev"
}
