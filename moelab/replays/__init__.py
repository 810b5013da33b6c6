"""One recorded stream under any choice: replay and bounds."""
