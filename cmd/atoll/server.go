package main

import (
	"fmt"
	"log/slog"
	"os"
	"strings"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/server"
)

// faultsEnv, in the environment, has a server take the calls of "atoll demo" that
// break its nodes, from those who may use its API: for tests of whole clusters.
const faultsEnv = "ATOLL_TEST_FAULTS"

// serverCommand is "atoll server".
func serverCommand() *cobra.Command {
	var showConfig bool
	cmd := &cobra.Command{
		Use:     "server",
		Short:   "Run a server: controller, storage nodes and gateways",
		GroupID: "run",
		Long: `Run a server. Without flags it is a whole cluster on loopback: an embedded
catalog, three storage nodes under the data directory, and an NBD gateway.

Every flag is also an environment variable (--disk-limit is ATOLL_DISK_LIMIT)
and a key in the TOML file; "atoll config show --origin" tells where a running
server's settings come from, "atoll server --show-config" those it would get.`,
		Example: `  atoll server
  atoll server --disk /mnt/a --disk /mnt/b --disk /mnt/c
  atoll server --join 127.0.0.1:7400 --token A1… --data ./second \
      --listen 127.0.0.1:7500 --nbd none`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := server.LoadConfig(cmd.Flags(), os.Environ())
			if err != nil {
				return err
			}
			if showConfig {
				for _, s := range cfg.Settings() {
					fmt.Fprintf(cmd.OutOrStdout(), "%-13s = %-28q # %s\n", s.Key, s.Value, s.Origin)
				}
				return nil
			}
			log, err := newLogger(cfg.LogLevel, cfg.LogFormat)
			if err != nil {
				return err
			}
			srv, err := server.Start(cmd.Context(), cfg, server.Options{Log: log, Version: buildVersion(), Faults: os.Getenv(faultsEnv) != ""})
			if err != nil {
				return err
			}
			notify(log, daemon.SdNotifyReady)
			select {
			case <-cmd.Context().Done():
				log.Info("stop requested")
			case err = <-srv.Failed():
			}
			notify(log, daemon.SdNotifyStopping)
			if serr := srv.Stop(); err == nil {
				err = serr
			}
			return err
		},
	}
	server.AddFlags(cmd.Flags())
	cmd.Flags().BoolVar(&showConfig, "show-config", false, "print the settings with their origins and exit")
	return cmd
}

// notify tells systemd; outside it does nothing.
func notify(log *slog.Logger, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		log.Warn("systemd notification lost", "err", err)
	}
}

// newLogger logs to standard error.
func newLogger(level, format string) (*slog.Logger, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(strings.ToUpper(level))); err != nil {
		return nil, fmt.Errorf("log level %q: want debug, info, warn or error: %w", level, atoll.ErrInvalid)
	}
	opts := &slog.HandlerOptions{Level: l}
	if format == "json" {
		return slog.New(slog.NewJSONHandler(os.Stderr, opts)), nil
	}
	return slog.New(slog.NewTextHandler(os.Stderr, opts)), nil
}
