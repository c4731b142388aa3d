package main

import (
	"context"
	"os"

	"github.com/spf13/pflag"

	"github.com/atollstore/atoll/internal/api/atollv1"
	"github.com/atollstore/atoll/internal/server"
)

// checkOffline checks volumes of a stopped server, with the settings that it
// would start with but for the places of its data.
func checkOffline(ctx context.Context, data string, disks, names []string, read bool, each func(string, *atollv1.CheckVolumeResponse, error)) error {
	args := []string{"--data", data, "--spare", "0", "--log-level", "error"}
	for _, d := range disks {
		args = append(args, "--disk", d)
	}
	flags := pflag.NewFlagSet("check", pflag.ContinueOnError)
	server.AddFlags(flags)
	if err := flags.Parse(args); err != nil {
		return err
	}
	cfg, err := server.LoadConfig(flags, os.Environ())
	if err != nil {
		return err
	}
	log, err := newLogger(cfg.LogLevel, cfg.LogFormat)
	if err != nil {
		return err
	}
	return server.CheckOffline(ctx, cfg, server.Options{Log: log, Version: buildVersion()}, names, read, each)
}
