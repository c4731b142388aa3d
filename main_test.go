package atoll_test

import (
	"flag"
	"os"
	"testing"

	"github.com/atollstore/atoll/internal/server"
	"github.com/atollstore/atoll/internal/server/servertest"
)

// TestMain starts a server for the examples, where they look for one.
func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(servertest.Run(func(*server.Server) int { return m.Run() }))
}
