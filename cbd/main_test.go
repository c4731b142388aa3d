package cbd_test

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"

	"github.com/atollstore/atoll/internal/host/hosttest"
	"github.com/atollstore/atoll/internal/server"
	"github.com/atollstore/atoll/internal/server/servertest"
)

// clientConf is the path of the examples' client.conf.
var clientConf string

// TestMain starts a server for the examples.
func TestMain(m *testing.M) {
	flag.Parse()
	code := servertest.Run(func(s *server.Server) int {
		clientConf = filepath.Join(os.Getenv("ATOLL_RUNTIME_DIR"), "client.conf")
		if err := os.WriteFile(clientConf, []byte("mds.listen.addr=unix:"+s.Socket()+"\n"), 0o600); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return m.Run()
	})
	if code == 0 {
		// The log goroutine of etcd's packages starts at import and stays.
		if err := hosttest.Leaks(goleak.IgnoreTopFunction("go.opencensus.io/stats/view.(*worker).start")); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}
